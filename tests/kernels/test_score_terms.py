"""Dense rows and single entries add the same terms as one row after the other does."""

import numpy as np
import pytest
import torch
from scipy import sparse

from llmgr_rec.kernels.score_terms import BlockTerms, TermRows, _DenseTerms, _SparseTerms, block_terms

NUM_BLOCKS, WIDTH, NUM_ITEMS = 3, 8, 22


def terms_of_queries() -> TermRows:
    generator = np.random.default_rng(0)
    terms_LR = generator.standard_normal((9, NUM_ITEMS)).astype(np.float32) * (generator.random((9, NUM_ITEMS)) < 0.5)
    terms_LR[4] = 0
    # The second query has no rows.
    return TermRows(sparse.csr_array(terms_LR), np.array([0, 4, 4, 6, 9]))


def reference(added: TermRows) -> np.ndarray:
    sums_BR = np.zeros((len(added.offsets_B1) - 1, NUM_ITEMS), np.float32)
    for query, sums_R in enumerate(sums_BR):
        for row in range(added.offsets_B1[query], added.offsets_B1[query + 1]):
            sums_R += added.rows_LR.toarray()[row]
    return sums_BR


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_terms_of_each_block_are_those_of_a_sum_row_by_row(form: str) -> None:
    added, per_unit_B = terms_of_queries(), np.array([1e3, 1e4, 1e5, 1e6], np.float32)
    sums_BN, units_BN = (torch.empty(4, WIDTH, dtype=torch.int32) for _ in range(2))
    terms: BlockTerms = _SparseTerms(added, per_unit_B, NUM_BLOCKS, WIDTH)
    if form == "dense":
        terms = _DenseTerms(added, per_unit_B, NUM_BLOCKS, sums_BN, units_BN)
    expected_BR = np.zeros((4, NUM_BLOCKS * WIDTH), np.float32)
    expected_BR[:, :NUM_ITEMS] = reference(added)
    for number in range(NUM_BLOCKS):
        products_BN = torch.full((4, WIDTH), 7, dtype=torch.int32)
        terms.add_to(products_BN, number)
        expected_BN = expected_BR[:, number * WIDTH : (number + 1) * WIDTH]
        # Less than one for each row.
        assert (np.abs(products_BN.numpy() - 7 - expected_BN.astype(np.float64) * per_unit_B[:, None]) < 4.5).all()
        places_C = np.array([0, 3, 9, 20, 21, 31])
        np.testing.assert_array_equal(terms.of_candidates(places_C), expected_BN.reshape(-1)[places_C])


def test_the_form_follows_the_share_of_items_with_a_term() -> None:
    added, per_unit_B = terms_of_queries(), np.ones(4, np.float32)
    for width, form in ((WIDTH, _DenseTerms), (WIDTH * 1000, _SparseTerms)):
        memory = [torch.empty(4, width, dtype=torch.int32) for _ in range(2)]
        assert type(block_terms(added, per_unit_B, NUM_BLOCKS, *memory)) is form


def test_some_queries_keep_their_terms_and_no_sum_exceeds_its_bound() -> None:
    added = terms_of_queries()
    some = added.narrow(1, 3)
    np.testing.assert_array_equal(reference(some), reference(added)[1:3])
    assert (np.abs(reference(added)).max(axis=1) <= added.bounds()).all()
    assert added.bounds()[1] == 0
    assert TermRows(sparse.csr_array((0, 5), dtype=np.float32), np.array([0, 0])).bounds().tolist() == [0]
