import sys

import numpy as np
import pytest

from benchmarks import large_training
from benchmarks.phase_peaks import PhasePeaks
from llmgr_rec.errors import UserError


def test_too_few_items_are_refused():
    with pytest.raises(UserError, match="--items"):
        large_training.main(["--items", "[3]"])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can count the peak of a phase")
def test_a_phase_does_not_count_for_the_one_around_it():
    peaks = PhasePeaks()
    with peaks.phase("outer"), peaks.phase("inner"):
        np.ones(100 << 20, np.uint8)
    assert 90 < peaks.mib["inner"] - peaks.mib["outer"] < 110
