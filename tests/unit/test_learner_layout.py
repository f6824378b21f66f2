"""A checkpoint belongs to as many ranks, and to the stage of ZeRO, that wrote it."""

import pytest

from entroray.config import LearnerConfig, Model
from entroray.errors import PreflightError
from entroray.objective import build_objective
from entroray.workers.learner_rank import LearnerRank, LearnerSettings


@pytest.mark.parametrize(("ranks", "stage"), [(2, 1), (1, 3), (1, 0)])
def test_a_checkpoint_of_other_ranks_or_another_stage_is_refused_with_what_it_was(ranks, stage, tmp_path):
    learner = LearnerConfig(ranks=ranks, zero_stage=stage)
    rank = LearnerRank(0, LearnerSettings(learner, Model(), "plasma", 0, 1), build_objective("grpo"), None)
    (tmp_path / "layout.json").write_text('{"learner.ranks": 1, "learner.zero_stage": 1}')
    with pytest.raises(PreflightError, match=r"learner\.ranks=1 learner\.zero_stage=1.*run\.dir"):
        rank.load(str(tmp_path))


def test_a_checkpoint_that_does_not_say_who_wrote_it_is_refused(tmp_path):
    rank = LearnerRank(
        0, LearnerSettings(LearnerConfig(), Model(), "plasma", 0, 1), build_objective("grpo"), None
    )
    with pytest.raises(PreflightError, match=r"layout\.json"):
        rank.load(str(tmp_path))
