import re

from tests.examples.run_example import run_example


def test_the_llm_stage_learns_on_top_of_the_session_recommender() -> None:
    printed = run_example("llm_stage")
    for model in ("session recommender", "LLMGR"):
        (values,) = re.findall(rf"^{model}: loss ([\d.]+) at first, ([\d.]+) at last$", printed, re.MULTILINE)
        first, last = map(float, values)
        assert last < 0.75 * first
        (rate,) = re.findall(rf"^{model}: HR@20 ([\d.]+)", printed, re.MULTILINE)
        # A random ranking has 0.05.
        assert float(rate) > 0.5
