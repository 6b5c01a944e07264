"""Settings of the training stages, of which `llmgr_rec.config` holds one each."""

from dataclasses import dataclass, field
from typing import Literal, get_args

TrainableGroup = Literal["tables", "encoder", "text_encoder", "adapter", "lora", "head"]
StageName = Literal["sbr", "text", "align", "behave"]
# In the order in which they are trained.
STAGES: tuple[StageName, ...] = get_args(StageName)
# Those of the session recommender; the others tune the language model.
RECOMMENDER_STAGES = STAGES[:2]


@dataclass
class StageConfig:
    """One training stage.

    Args:
        epochs: Passes over the training examples; 0 skips the training of this stage.
        max_steps: Optimizer steps after which the stage ends; 0 means no limit.
        batch_size: Training examples of one optimizer step, over all ranks; sessions where the stage reads
            them in one pass (sbr.one_pass; behave.one_pass).
        lr: Peak learning rate of the dense parameters, per step.
        weight_decay: AdamW weight decay of the dense parameters.
        warmup: Share of the steps spent in linear warm-up; the rest follows a cosine to zero.
        clip_norm: Largest global gradient norm of the dense parameters.
        trainable: Parameter groups that this stage trains; all others stay bit-identical.
        eval_every: Epochs between validations, the last epoch included; the best weights are kept. 0 validates never.
        patience: Validations without a better NDCG@20 before the stage stops; 0 never stops early.
    """

    epochs: int = 1
    max_steps: int = 0
    batch_size: int = 512
    lr: float = 1e-3
    weight_decay: float = 1e-2
    warmup: float = 0.05
    clip_norm: float = 1.0
    trainable: list[TrainableGroup] = field(default_factory=list)
    eval_every: int = 1
    patience: int = 0


@dataclass
class SbrConfig(StageConfig):
    """Session-recommender pre-training.

    Args:
        one_pass: Read each training session once and ask for the next item after every click, in place of reading each
            of its prefixes for itself. The same targets for a fraction of the work; needs an encoder whose states know
            no later clicks (sasrec, gru4rec). Sessions longer than encoder.max_clicks are asked in parts of so many.
    """

    one_pass: bool = False


@dataclass
class TextConfig(StageConfig):
    """The whole language model, trained to read sessions as text: for a GPU (docs/results/sessions-as-text.md).

    Args:
        dim: Columns of its vectors.
        clicks: Newest clicks whose texts are read.
        dropout: Share of the tokens, and of what was read in them, that is left out in a training step, 0 to 1.
        drawn_items: Items a step, beside the targets, among which the next one is to be found; all, where the catalogue
            has no more.
        score_weight: What its score counts beside that of the session encoder, once it is trained. Of several numbers
            the one with the best NDCG@20 on the validation sessions is taken, with prior.neighbours beside the model;
            at 0 it adds nothing.
    """

    dim: int = 128
    clicks: int = 10
    dropout: float = 0.1
    drawn_items: int = 512
    score_weight: float | list[float] = field(default_factory=lambda: [0.0, 0.125, 0.25, 0.5, 1.0, 2.0])


@dataclass
class AlignConfig(StageConfig):
    """Stage 1, auxiliary instruction tuning.

    Args:
        contrastive_weight: Weight of the structure-aware contrastive loss beside the node-context loss.
        contrastive_temperature: Divisor of the contrastive cosine similarities.
        hard_negatives: Corrupted node lists (one node replaced) per session, beside those of 15 other sessions.
    """

    contrastive_weight: float = 0.1
    contrastive_temperature: float = 0.07
    hard_negatives: int = 0


@dataclass
class BehaveConfig(StageConfig):
    """Stage 2, behaviour pattern modelling.

    Args:
        one_pass: Read each training session once and ask for the next item after every click, in place of a prompt for
            each. The same targets for a fraction of the tokens; needs a template whose first place is {nodes}, such as
            those of prompt.templates compact.
    """

    one_pass: bool = False
