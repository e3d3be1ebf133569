"""The corpus of malformed files: each case is one good file with one piece of text replaced.

`at` is text that stands on the line the message must name; `words` must all stand in the message.
"""

from __future__ import annotations

from dataclasses import dataclass

EXPERIMENT = """\
# chrysalis run good.yaml
name: good
rng_seed: 17
blueprint: ./blueprint.yaml
genome:
  sources:
    - type: python
      domains: [code, docstrings, comments]
    - type: folder
      path: notes
      domain: notes
      glob: "**/*.md"
    - {type: jsonl, path: chats.jsonl, domain: chats}
  split: {select: 0.06, report: 0.06}
population:
  variants: 4
  tokens_per_variant: 4096
  reports: 4
  search:
    learning_rate: {type: log_uniform, low: 1e-4, high: 1e-2}
    rank: {type: choice, values: [4, 8]}
    alpha: {type: uniform, low: 8, high: 32}
    decay: {type: choice, values: [cosine, linear]}
  epigenomes:
    type: listed
    mixes:
      - name: even
        express: {code: 1, docstrings: 1}
      - name: talk
        express: {chats: 2, notes: 0.5}
  scheduler:
    type: asha
    grace_reports: 1
    reduction_factor: 2
evaluate: {rows_per_domain: 4, confidence: 0.9}
merge:
  - method: winner
  - method: ensemble
    rank: 8
  - method: consensus
    support: 0.5
tracking:
  wandb: offline
  tags: [one, two]
"""

BLUEPRINT = """\
# chrysalis run good.yaml
name: good
base:
  type: embedded
  hidden_size: 64
  layers: 2
  heads: 4
  key_value_heads: 2
  head_size: 16
  vocabulary: 512
lora:
  rank: 8
  alpha: 16
  targets: [q_proj, v_proj]
optimizer:
  learning_rate: 1e-3
  clip: 1.0
schedule: {decay: cosine, warmup_fraction: 0.1}
lanes:
  sequence_length: 64
  rows_per_step: 4
body:
  workers: 1
  slots: 4
"""


@dataclass(frozen=True)
class Case:
    name: str
    old: str
    new: str
    at: str
    words: tuple[str, ...]
    blueprint: bool = False


def adapter(name: str, written: str, *words: str) -> Case:
    """A blueprint with an adapter of another kind."""
    return Case(name, "optimizer:\n", f"adapter: {written}\noptimizer:\n", "adapter:", words, blueprint=True)


def exp(name: str, old: str, new: str, at: str, *words: str) -> Case:
    return Case(name, old, new, at, words)


def blue(name: str, old: str, new: str, at: str, *words: str) -> Case:
    return Case(name, old, new, at, words, blueprint=True)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
LADDER = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 200))

CHATS = "{type: jsonl, path: chats.jsonl, domain: chats}"
ID = "0" * 40

PACKED = [
    exp(
        "a transport that runs",
        CHATS,
        f"{{type: git, url: 'ext::sh x', commit: {ID[:-1]}a, domain: d}}",
        "ext::",
        "runs a command",
    ),
    exp("an option as url", CHATS, f"{{type: git, url: '--upload-pack=x', commit: {ID[:-1]}a, domain: d}}", "upload", "dash"),
    exp("no commit", CHATS, "{type: git, url: ./nowhere, domain: d}", "nowhere", "commit: is missing", "git rev-parse HEAD"),
    exp("no repository", CHATS, f"{{type: git, url: ./nowhere, commit: {ID[:-1]}a, domain: d}}", "nowhere", "no repository"),
    exp("no archive", CHATS, "{type: archive, path: gone.zip, domain: d}", "gone.zip", "no archive"),
    exp(
        "no commit id", CHATS, "{type: git, url: 'https://a/b', commit: 'a..b', domain: d}", "a..b", "neither a full commit id"
    ),
    exp("no domain", CHATS, "{type: packages, names: all}", "packages, names", "either `domain` or `domains_by`"),
    exp("glob that climbs", CHATS, "{type: packages, names: all, domain: d, glob: '../*'}", "../*", "leaves the source"),
    exp(
        "a history that runs", CHATS, "{type: history, url: 'ext::sh x', domain: d, snapshots: [v1]}", "ext::", "runs a command"
    ),
    exp("a snapshot twice", CHATS, "{type: history, url: 'https://a/b', domain: d, snapshots: [v, v]}", "v, v", "named twice"),
    exp("no history", CHATS, "{type: history, url: ./nowhere, domain: d, snapshots: [v]}", "nowhere", "no repository"),
    exp("no records", CHATS, "{type: records, path: gone.jsonl, domain: d}", "gone.jsonl", "no file"),
    exp("no forget list", "  split: {", "  forget: gone.jsonl\n  split: {", "forget", "no file", "forgotten.jsonl"),
    exp("no robots", "  split: {", "  use_denied: [{robots: gone.txt}]\n  split: {", "use_denied", "no file", "robots.txt"),
    exp("two denials", "  split: {", "  use_denied: [{paths: a, licence: b}]\n  split: {", "use_denied", "exactly one"),
    exp("names that are a word", CHATS, "{type: packages, names: numpy, domain: d}", "names: numpy", "genome.sources.2.names"),
]

TYPOS = [
    exp("typo at the top", "rng_seed: 17", "rng_sed: 17", "rng_sed", "unknown key 'rng_sed'", "did you mean 'rng_seed'"),
    exp("typo in population", "variants: 4", "varients: 4", "varients", "population.varients", "did you mean 'variants'"),
    exp("typo in search", "learning_rate: {", "learnign_rate: {", "learnign_rate", "did you mean 'learning_rate'"),
    exp("typo in a union member", "grace_reports: 1", "grace_report: 1", "grace_report: 1", "did you mean 'grace_reports'"),
    exp("typo in a git source", CHATS, "{type: git, url: ../x, comit: abc, domain: d}", "comit", "did you mean 'commit'"),
    exp("typo in a mark", "  split: {", "  exclude: [secrets]\n  split: {", "exclude", "did you mean 'secret'"),
    exp("typo in a source", 'glob: "**/*.md"', "globb: x", "globb", "genome.sources.1.globb", "did you mean 'glob'"),
    exp("typo in a merge", "support: 0.5", "suport: 0.5", "suport", "merge.2.suport", "did you mean 'support'"),
    blue("typo in lora", "alpha: 16", "alhpa: 16", "alhpa", "lora.alhpa", "did you mean 'alpha'"),
    blue("dash for underscore", "hidden_size: 64", "hidden-size: 64", "hidden-size", "did you mean 'hidden_size'"),
]

OTHER_TRAINERS = [
    blue("peft r", "  rank: 8", "  r: 8", "  r: 8", "the name here is lora.rank"),
    blue("axolotl lora_r", "lora:\n", "lora_r: 8\nlora:\n", "lora_r", "the name here is lora.rank"),
    blue("axolotl lora_alpha", "  alpha: 16", "  lora_alpha: 16", "lora_alpha", "the name here is lora.alpha"),
    blue("lr", "  learning_rate: 1e-3", "  lr: 1e-3", "  lr:", "the name here is optimizer.learning_rate"),
    blue("axolotl base_model", "base:\n", "base_model: Qwen/Qwen3-0.6B\nbase:\n", "base_model", "the name here is base.model"),
    blue("trl model name", "base:\n", "model_name_or_path: x\nbase:\n", "model_name_or_path", "the name here is base.model"),
    blue("llama-factory cutoff_len", "  sequence_length: 64", "  cutoff_len: 64", "cutoff_len", "lanes.sequence_length"),
    blue("axolotl sequence_len", "lanes:\n", "sequence_len: 64\nlanes:\n", "sequence_len:", "lanes.sequence_length"),
    blue("axolotl micro_batch_size", "lanes:\n", "micro_batch_size: 2\nlanes:\n", "micro_batch", "lanes.rows_per_microstep"),
    blue("trl batch size", "lanes:\n", "per_device_train_batch_size: 2\nlanes:\n", "per_device", "lanes.rows_per_microstep"),
    blue(
        "grad accumulation",
        "lanes:\n",
        "gradient_accumulation_steps: 2\nlanes:\n",
        "gradient_acc",
        "lanes.rows_per_microstep",
        "rows_per_step / steps of accumulation",
    ),
    blue("llama-factory lora_target", "  targets: [q_proj, v_proj]", "  lora_target: all", "lora_target", "lora.targets"),
    blue(
        "hf warmup_ratio",
        "schedule: {decay: cosine, warmup_fraction: 0.1}",
        "warmup_ratio: 0.1",
        "warmup_ratio",
        "the name here is schedule.warmup_fraction",
    ),
    blue(
        "hf lr_scheduler_type",
        "schedule: {decay: cosine",
        "schedule: {lr_scheduler_type: cosine",
        "lr_scheduler_type",
        "schedule.decay",
    ),
    blue("dropout", "  rank: 8", "  rank: 8\n  lora_dropout: 0.1", "lora_dropout", "the name here is lora.dropout"),
    blue("lora plus", "  rank: 8", "  rank: 8\n  loraplus_lr_ratio: 16", "loraplus", "the name here is lora.plus_ratio"),
    blue("lora fa", "  rank: 8", "  rank: 8\n  use_lora_fa: true", "use_lora_fa", "the name here is lora.freeze_a"),
    blue(
        "axolotl min lr", "decay: cosine", "cosine_min_lr_ratio: 0.1", "cosine_min", "the name here is schedule.final_fraction"
    ),
    blue("axolotl dora", "  rank: 8", "  rank: 8\n  peft_use_dora: true", "peft_use", "the name here is lora.use_dora"),
    blue(
        "whole modules of others",
        "  rank: 8",
        "  rank: 8\n  lora_modules_to_save: [norm]",
        "lora_modules",
        "the name here is lora.modules_to_save",
    ),
    blue("another kind", "  rank: 8", "  rank: 8\n  peft_type: VERA", "peft_type", "written as adapter: {type: ...}"),
    adapter("unknown kind", "{type: lohaa}", "'lohaa' is not known", "did you mean 'loha'"),
    adapter("adalora", "{type: adalora, deltaT: 0}", "deltaT"),
    adapter("prefix tuning", "{type: prefix-tuning}", "several documents"),
    adapter("lora as adapter", "{type: lora}", "is what a blueprint means by lora"),
    adapter("kind misspelt field", "{type: loha, alhpa: 4}", "adapter.alhpa", "did you mean 'alpha'"),
    adapter("kind in peft's names", "{type: loha, r: 4}", "the name here is adapter.rank"),
    adapter("kind targets in peft's names", "{type: vera, target_modules: [q_proj]}", "the name here is adapter.targets"),
    adapter("kind dropout", "{type: oft, module_dropout: 0.1}", "would see another"),
    adapter("kind without kind", "{rank: 4}", "has no `type`"),
    adapter("kind field of another", "{type: ia3, rank: 4}", "unknown key 'rank'"),
    adapter("kind wrong number", "{type: road, group_size: 3}", "group_size"),
    adapter("kind no such layer", "{type: hra, targets: [query]}", "'query' is no linear layer of Qwen3"),
    adapter("kind no such norm", "{type: ln_tuning, targets: [q_proj]}", "'q_proj' is no norm of Qwen3"),
    blue("peft pissa", "  rank: 8", "  rank: 8\n  init: pissa_niter_16", "init:", "lora.init", "at random", "write pissa"),
    blue("lora-ga", "  rank: 8", "  rank: 8\n  init: LoRA-GA", "init:", "lora.init", "first gradient", "write eva or kaiming"),
    blue("orthogonal init", "  rank: 8", "  rank: 8\n  init: orthogonal", "init:", "begins with a B that is not zero"),
    blue("init true", "  rank: 8", "  rank: 8\n  init: true", "init:", "peft's word for kaiming"),
    blue("init false", "  rank: 8", "  rank: 8\n  init: false", "init:", "adapter zero must change nothing"),
    blue("loftq init", "  rank: 8", "  rank: 8\n  init: loftq", "init:", "quantises the base's weights"),
    blue("peft's layers", "  rank: 8", "  rank: 8\n  layers_to_transform: [0]", "layers_to", "the name here is lora.layers"),
    blue("peft's exclude", "  rank: 8", "  rank: 8\n  exclude_modules: [k_proj]", "exclude_m", "the name here is lora.exclude"),
    *(
        blue(f"{field} pattern: {what}", "  rank: 8", f"  rank: 8\n  {field}_pattern: {written}", f"{field}_pattern", *words)
        for field, what, written, *words in (
            ("rank", "a regular expression", '{"(a+)+$": 2}', "regular expression", "q_proj"),
            ("alpha", "a dot too many", "{.q_proj: 2}", "no name"),
            ("rank", "another module", "{k_proj: 2}", "means none of lora.targets (q_proj, v_proj)"),
            ("rank", "zero", "{q_proj: 0}", "q_proj"),
            ("rank", "half", "{q_proj: 1.5}", "q_proj"),
            ("alpha", "nothing", "{q_proj: 0}", "q_proj"),
            ("rank", "a list", "[4]", "rank_pattern"),
            ("rank", "hidden", "{q_proj: 2, layers.0.self_attn.q_proj: 4}", "'q_proj' means all", "write it after"),
        )
    ),
    blue("peft init", "  rank: 8", "  rank: 8\n  init_lora_weights: eva", "init_lora", "the name here is lora.init"),
    blue("four bits", "workers: 1", "workers: 1\n  load_in_4bit: true", "load_in", "body.quantization", "quantization: nf4"),
    blue("remote code", "  layers: 2", "  trust_remote_code: true", "trust_remote_code", "never run"),
    exp(
        "hf epochs",
        "tokens_per_variant: 4096",
        "num_train_epochs: 3",
        "num_train_epochs",
        "tokens_per_variant",
        "budgets are tokens",
    ),
    exp("ray num_samples", "  variants: 4", "  num_samples: 4", "num_samples", "the name here is population.variants"),
    exp("random seed", "rng_seed: 17", "seed: 17", "seed: 17", "the name here is rng_seed", "never a random number"),
    exp("blueprint key here", "rng_seed: 17", "optimizer: {learning_rate: 1}", "optimizer:", "belongs to the blueprint"),
    exp(
        "key on the wrong floor",
        "rng_seed: 17",
        "scheduler: {type: fifo}",
        "scheduler: {",
        "it belongs to population.scheduler",
    ),
    blue("experiment key there", "lora:\n", "population: {variants: 2}\nlora:\n", "population:", "belongs to the experiment"),
]

TYPES = [
    exp(
        "number as text",
        "low: 1e-4",
        "low: '1e-4'",
        "low: '1e-4'",
        "search.learning_rate.low",
        "'1e-4' is text",
        "write 1e-4 without",
    ),
    blue(
        "rate as text",
        "learning_rate: 1e-3",
        'learning_rate: "1e-3"',
        'rate: "1e-3"',
        "is text; a number was meant",
        "write 1e-3",
    ),
    exp("underscored number", "tokens_per_variant: 4096", "tokens_per_variant: 4_096", "4_096", "write 4096 without"),
    exp("fraction for a count", "variants: 4", "variants: 4.0", "variants: 4.0", "a whole number was meant", "write 4"),
    exp("truth for a count", "variants: 4", "variants: true", "variants: true", "is true/false; a whole number was meant"),
    exp("word for a count", "reports: 4", "reports: often", "reports: often", "'often' is text; a whole number was meant"),
    exp("negative count", "variants: 4", "variants: -4", "variants: -4", "must be >= 1, not -4"),
    exp("zero tokens", "tokens_per_variant: 4096", "tokens_per_variant: 0", "tokens_per_variant: 0", "must be >= 1, not 0"),
    exp(
        "share above one",
        "confidence: 0.9",
        "confidence: 1.5",
        "confidence: 1.5",
        "evaluate.confidence",
        "must be < 1, not 1.5",
    ),
    *(
        exp(
            f"what a domain may lose: {name}",
            "confidence: 0.9}",
            f"confidence: 0.9, max_domain_loss: {written}}}",
            "max_domain_loss",
            where,
            *words,
        )
        for name, written, where, *words in (
            ("nobody's", "{cod: 0.0}", "max_domain_loss.cod", "no source provides", "did you mean 'code'", "'*' speaks"),
            ("default", "{default: 0.1}", "max_domain_loss.default", "no source provides", "'*' speaks for all others"),
            ("negative", "{code: -1}", "max_domain_loss.code", "must be >= 0, not -1"),
            ("negative for all", "-0.1", "max_domain_loss", "must be >= 0, not -0.1"),
            ("a word", "{code: lots}", "max_domain_loss.code", "'lots' is text; a number was meant"),
            ("a word for all", "little", "max_domain_loss", "'little' is text; a number was meant"),
            ("nothing", "{}", "max_domain_loss", "is an empty mapping; a number was meant, or numbers by domain"),
            ("a list", "[0.1]", "max_domain_loss", "this is a list; a number was meant"),
            ("no number", "{code: .nan}", "max_domain_loss.code", "nan is not a finite number"),
            ("truth", "{code: true}", "max_domain_loss.code", "true is true/false; a number was meant"),
        )
    ),
    exp("negative distance", "confidence: 0.9}", "max_divergence: -1}", "max_divergence", "must be >= 0, not -1"),
    exp("not a number", "reduction_factor: 2", "reduction_factor: .nan", ".nan", "nan is not a finite number"),
    exp("infinite", "reduction_factor: 2", "reduction_factor: 1e999", "1e999", "inf is not a finite number"),
    exp(
        "empty section",
        "population:\n  variants: 4",
        "population:\nrest:\n  variants: 4",
        "population:",
        "is empty; a mapping was meant",
    ),
    exp(
        "list for a mapping",
        "evaluate: {rows_per_domain: 4, confidence: 0.9}",
        "evaluate: [4]",
        "evaluate:",
        "a mapping was meant",
    ),
    exp(
        "mapping for a list", "tags: [one, two]", "tags: {one: 1}", "tags: {", "a list was meant", "start each entry with '- '"
    ),
    exp("word for a list", "tags: [one, two]", "tags: one", "tags: one", "a list was meant", "write [one]"),
    exp("number for a name", "name: good", "name: 17", "name: 17", "a number; text was meant", "quotes"),
    exp("path as a name", "name: good", "name: ../../etc/cron.d", "name: ..", "is no name", "no '/'"),
    exp("path as a mix name", "- name: even", "- name: ../even", "- name: ..", "is no name"),
    exp("path as a domain", "domain: notes", "domain: /tmp/notes", "domain: /tmp", "is no name"),
    exp("path as a merge name", "- method: ensemble\n", "- method: ensemble\n    name: a/b\n", "name: a/b", "is no name"),
    blue("choice of words", "decay: cosine", "decay: cosin", "decay: cosin", "'cosin' is not known", "did you mean 'cosine'"),
    blue("zero stage 2", "workers: 1", "workers: 1\n  zero_stage: 2", "zero_stage: 2", "2 is not known", "known: 0, 3"),
    blue(
        "truth for the stage",
        "workers: 1",
        "workers: 1\n  zero_stage: false",
        "zero_stage: false",
        "true/false; 0 or 3 was meant",
    ),
    blue("negative size", "hidden_size: 64", "hidden_size: -64", "hidden_size: -64", "must be >= 16, not -64"),
    blue(
        "no for false", "  rank: 8", "  rank: 8\n  use_rslora: no", "use_rslora: no", "true or false was meant", "write false"
    ),
    blue("fp16", "  slots: 4", "  slots: 4\n  precision: fp16", "precision: fp16", "'fp16' is not known", "known: fp32, bf16"),
]

UNIONS = [
    exp(
        "unknown scheduler",
        "type: asha",
        "type: ahsa",
        "type: ahsa",
        "scheduler",
        "did you mean 'asha'",
        "known: fifo, asha, hyperband, pbt, pb2, median, bohb",
    ),
    exp("scheduler without type", "    type: asha\n", "", "scheduler:", "has no `type`", "one of fifo, asha, hyperband, pbt"),
    exp(
        "scheduler as a word",
        "  scheduler:\n    type: asha\n    grace_reports: 1\n    reduction_factor: 2",
        "  scheduler: asha",
        "scheduler: asha",
        "is text",
        "a mapping with `type`",
    ),
    exp("unknown source", "type: folder", "type: directory", "- type: directory", "known: python, folder, jsonl, dataset"),
    exp(
        "unknown merge",
        "- method: ensemble",
        "- method: teis",
        "- method: teis",
        "'teis' is not known; did you mean 'ties'?",
        "known: winner, ensemble, consensus",
    ),
    exp(
        "merge without method",
        "- method: consensus\n    support",
        "- support",
        "- support",
        "has no `method`",
        "winner, ensemble",
    ),
    exp("unknown range", "{type: log_uniform, low", "{type: loguniform, low", "loguniform", "did you mean 'log_uniform'"),
    exp(
        "bare value for a range",
        "rank: {type: choice, values: [4, 8]}",
        "rank: [4, 8]",
        "rank: [",
        "a mapping with `type`",
        "choice",
    ),
    blue("unknown base", "type: embedded", "type: hub", "type: hub", "base", "known: embedded, pretrained"),
    exp("missing key", "  variants: 4\n", "", "population:", "population.variants: is missing: a whole number was meant"),
    exp(
        "missing section",
        EXPERIMENT[EXPERIMENT.index("genome:") : EXPERIMENT.index("population:")],
        "",
        "name: good",
        "genome: is missing: a mapping of sources, split",
    ),
]

RULES = [
    exp(
        "low above high",
        "low: 1e-4, high: 1e-2",
        "low: 1e-2, high: 1e-4",
        "low: 1e-2",
        "low (0.01) must be below high (0.0001)",
    ),
    exp("negative rate", "low: 1e-4", "low: -1e-4", "low: -1e-4", "must be > 0"),
    exp(
        "zero rate by uniform",
        "{type: log_uniform, low: 1e-4",
        "{type: uniform, low: 0",
        "low: 0,",
        "learning_rate must be above 0",
    ),
    exp(
        "rank by uniform",
        "{type: choice, values: [4, 8]}",
        "{type: uniform, low: 4, high: 8}",
        "rank: {",
        "rank is a whole number",
        "values: [4",
    ),
    exp("rank as text", "values: [4, 8]", "values: [4, '8']", "'8'", "search.rank.values.1", "'8' is text; a number was meant"),
    exp("rank zero", "values: [4, 8]", "values: [0, 8]", "[0, 8]", "search.rank.values.0", "rank must be at least 1"),
    exp("fractional rank", "values: [4, 8]", "values: [4, 8.5]", "8.5", "no whole number"),
    exp("alpha below zero", "low: 8, high: 32", "low: -8, high: 32", "low: -8", "must be above 0"),
    exp(
        "unknown decay",
        "values: [cosine, linear]",
        "values: [cosine, cubic]",
        "cubic",
        "'cubic' is no decay",
        "constant, linear, cosine",
    ),
    exp(
        "grid above variants",
        "{type: choice, values: [4, 8]}",
        "{type: grid, values: [1, 2, 4, 8, 16]}",
        "variants: 4",
        "grid of 5 points (rank 5)",
        "write variants: 5",
    ),
    exp(
        "unknown domain",
        "express: {code: 1, docstrings",
        "express: {code: 1, docstring",
        "docstring:",
        "no source provides the domain",
        "did you mean 'docstrings'",
    ),
    exp("mix of nothing", "express: {chats: 2, notes: 0.5}", "express: {chats: 0, notes: 0}", "chats: 0", "every level is 0"),
    exp("negative level", "notes: 0.5", "notes: -0.5", "notes: -0.5", "express.notes", "must be >= 0"),
    exp("empty mix", "express: {chats: 2, notes: 0.5}", "express: {}", "express: {}", "is empty"),
    exp("twin mixes", "- name: talk", "- name: even", "mixes:", "mix name 'even' is used twice"),
    exp(
        "twin merges",
        "- method: consensus\n    support: 0.5",
        "- method: ensemble",
        "merge:",
        "'ensemble' is used twice",
        "another `name`",
    ),
    exp(
        "a merge named like the seed",
        "- method: consensus\n",
        "- method: consensus\n    name: seed\n",
        "merge:",
        "'seed' is taken",
    ),
    exp(
        "a merge named like its manifest",
        "- method: consensus\n",
        "- method: consensus\n    name: merges.json\n",
        "merge:",
        "'merges.json' is taken",
    ),
    exp(
        "a merge named like a variant",
        "- method: consensus\n",
        "- method: consensus\n    name: v003-code\n",
        "merge:",
        "'v003-code' is taken",
    ),
    exp(
        "weights of another tool",
        "- method: ensemble\n",
        "- method: ensemble\n    weights: fisher\n",
        "weights: fisher",
        "'fisher' is not known",
        "known: uniform, softmax, geometric_median, robust, greedy",
    ),
    exp("weights as a list", "    rank: 8\n", "    weights: [0.5, 0.5]\n", "weights: [", "is not known", "known: uniform"),
    exp("an exact merge in slots", "    rank: 8\n", "    rank: exact\n", "rank: exact", "every slot", "write 32"),
    exp("a rank that is a word", "    rank: 8\n", "    rank: full\n", "rank: full", "merge.1.rank"),
    exp("density of nothing", "- method: ensemble\n", "- method: ties\n    density: 0\n", "density: 0", "must be > 0"),
    exp("density above all", "- method: ensemble\n", "- method: dare\n    density: 1.5\n", "density: 1.5", "must be <= 1"),
    exp(
        "a key of another method",
        "- method: ensemble\n",
        "- method: tall\n    density: 0.2\n",
        "density: 0.2",
        "unknown key 'density' here; it belongs to merge.density (ties) or merge.density (dare)",
    ),
    exp(
        "chances above one",
        "- method: ensemble\n    rank: 8",
        "- method: della\n    density: 0.9\n    spread: 0.2",
        "- method: della",
        "0.7 to 1.1",
        "at most 1",
    ),
    exp(
        "an exact adapter of full rank",
        "    rank: 8\n  - method: consensus\n    support: 0.5\n",
        "  - method: ties\n    space: dense\n    rank: exact\n",
        "- method: ties",
        "`space: dense` has full rank",
    ),
    exp("no winner", "  - method: winner\n", "", "merge:", "add `- method: winner`"),
    exp(
        "less than one step",
        "tokens_per_variant: 4096",
        "tokens_per_variant: 100",
        "tokens_per_variant: 100",
        "less than one optimizer step of 256 (4 rows x 64 tokens)",
        "at least 1024",
    ),
    exp(
        "more reports than steps",
        "reports: 4\n",
        "reports: 40\n",
        "reports: 40",
        "only 16 optimizer steps",
        "reports: 16 or fewer",
    ),
    exp("grace beyond the end", "grace_reports: 1", "grace_reports: 4", "grace_reports: 4", "4 of 4 reports", "type: fifo"),
    exp("too many brackets", "grace_reports: 1", "grace_reports: 1\n    brackets: 9", "brackets: 9", "only 3 rungs"),
    exp(
        "pbt in waves",
        "type: asha\n    grace_reports: 1\n    reduction_factor: 2",
        "type: pbt\nbody: {slots: 2}",
        "variants: 4",
        "never exchange weights",
        "slots: 4",
    ),
    exp(
        "pbt without a range",
        "type: asha\n    grace_reports: 1\n    reduction_factor: 2",
        "type: pbt\n    mutate: [clip]",
        "mutate: [clip]",
        "mutate.0",
        "no range for clip",
    ),
    exp(
        "pbt never",
        "type: asha\n    grace_reports: 1\n    reduction_factor: 2",
        "type: pbt\n    perturb_every_reports: 4",
        "perturb_every_reports: 4",
        "nothing would ever be perturbed",
    ),
    exp("merge rank too large", "    rank: 8\n", "    rank: 33\n", "rank: 33", "4 deltas of rank 8 sum to rank 32 at most"),
    exp("rank above the matrix", "values: [4, 8]", "values: [4, 64]", "rank: {", "rank 64 is above 32"),
    exp("missing folder", "path: notes", "path: nots", "path: nots", "no folder", "paths start at the experiment's folder"),
    exp("missing file", "path: chats.jsonl", "path: chat.jsonl", "chat.jsonl", "no file"),
    exp("folder for a file", "path: chats.jsonl", "path: notes", "path: notes,", "it is a folder", "type: folder"),
    exp("glob out of the folder", '"**/*.md"', '"../../**/*"', '"../../**/*"', "leaves the folder"),
    exp(
        "missing local data set",
        "- {type: jsonl, path: chats.jsonl",
        "- {type: dataset, path: ./chats",
        "./chats",
        "no folder",
        "hub",
    ),
    exp("missing blueprint", "./blueprint.yaml", "tinny", "blueprint: tinny", "did you mean 'tiny'", "qwen3-0.6b"),
    exp("workers and rows", "rng_seed: 17", "body: {workers: 3}", "body: {workers: 3}", "3 workers cannot share the 4 rows"),
    exp(
        "zero of a quantised base",
        "rng_seed: 17",
        "body: {zero_stage: 3, workers: 2, quantization: int8}",
        "quantization: int8",
        "body.quantization",
        "write zero_stage: 0",
    ),
    exp(
        "virtual workers of three",
        "rng_seed: 17",
        "body: {workers: 2, virtual_workers: 3, lanes: fixed}",
        "virtual_workers: 3",
        "write a multiple of 2",
    ),
    exp("virtual workers and bits", "rng_seed: 17", "body: {virtual_workers: 4}", "virtual_workers: 4", "write lanes: fixed"),
    exp("gradients of one", "rng_seed: 17", "body: {gradients: sharded}", "gradients: sharded", "workers is 1"),
    exp(
        "gradients kept apart",
        "rng_seed: 17",
        "body: {workers: 2, virtual_workers: 2, lanes: fixed, gradients: sharded}",
        "gradients: sharded",
        "write gradients: whole",
    ),
    exp("no patience", "rng_seed: 17", "body: {hang_seconds: 0}", "hang_seconds: 0", "5"),
    exp("zero alone", "rng_seed: 17", "body: {zero_stage: 3}", "zero_stage: 3", "workers is 1", "set workers: 2"),
    exp("nvme without a folder", "rng_seed: 17", "body: {offload: nvme, zero_stage: 3}", "offload: nvme", "needs a folder"),
    exp("a folder for cpu offload", "rng_seed: 17", "body: {nvme_path: /nvme}", "nvme_path", "is for offload: nvme, not none"),
    exp(
        "a folder seen from here",
        "rng_seed: 17",
        "body: {offload: nvme, zero_stage: 3, nvme_path: nvme}",
        "nvme_path",
        "nvme is not absolute",
    ),
    exp("nvme without zero", "rng_seed: 17", "body: {offload: nvme, nvme_path: /n}", "offload: nvme", "part of zero_stage 3"),
    exp("compile with moving lanes", "rng_seed: 17", "body: {compile: true}", "compile: true", "a pack of fixed lanes"),
    exp("hf compile", "rng_seed: 17", "body: {torch_compile: true}", "torch_compile", "the name here is body.compile"),
    exp(
        "compile a sharded base",
        "rng_seed: 17",
        "body: {compile: true, lanes: fixed, workers: 2, zero_stage: 3}",
        "compile: true",
        "needs zero_stage: 0",
    ),
    exp("offload without zero", "rng_seed: 17", "body: {offload: cpu}", "offload: cpu", "part of zero_stage 3"),
    exp("flash on a cpu", "rng_seed: 17", "body: {attention: flash}", "attention: flash", "gpus_per_worker is 0", "sdpa"),
    exp("flash in fp32", "rng_seed: 17", "body: {attention: flash, gpus_per_worker: 1}", "flash", "precision is fp32"),
    exp("unknown attention", "rng_seed: 17", "body: {attention: flsh}", "flsh", "'flsh' is not known", "known: sdpa, flash"),
    exp("shared gpu", "rng_seed: 17", "body: {workers: 2, gpus_per_worker: 0.5}", "0.5", "NCCL refuses"),
    exp(
        "several gpus a worker",
        "rng_seed: 17",
        "body: {gpus_per_worker: 8}",
        "gpus_per_worker: 8",
        "write workers: 8, gpus_per_worker: 1",
    ),
    exp(
        "missing model folder",
        "rng_seed: 17",
        "base: {type: pretrained, model: ./model}",
        "./model",
        "no folder",
        "Qwen/Qwen3-0.6B",
    ),
    blue("heads", "key_value_heads: 2", "key_value_heads: 3", "key_value_heads: 3", "3 does not divide heads (4)", "1, 2, 4"),
    blue("odd head", "head_size: 16", "head_size: 17", "head_size: 17", "17 is odd"),
    blue("unknown target", "[q_proj, v_proj]", "[q_proj, v_porj]", "v_porj", "lora.targets.1", "did you mean 'v_proj'"),
    blue("all-linear", "[q_proj, v_proj]", "[all-linear]", "all-linear", "is not a module; name them: q_proj"),
    blue("all dropped", "  rank: 8", "  rank: 8\n  dropout: 1.0", "dropout", "must be < 1, not 1"),
    blue("no ratio", "  rank: 8", "  rank: 8\n  plus_ratio: 0", "plus_ratio", "must be > 0, not 0"),
    blue("half frozen", "  rank: 8", "  rank: 8\n  freeze_a: 0.5", "freeze_a", "true or false"),
    blue("optimizer of matrices", "  clip: 1.0", "  clip: 1.0\n  type: muon", "type: muon", "matrices", "adamw, adam"),
    blue("unknown optimizer", "  clip: 1.0", "  clip: 1.0\n  type: adamww", "type: adamww", "adamw"),
    blue("all momentum", "  clip: 1.0", "  clip: 1.0\n  momentum: 1", "momentum", "must be < 1, not 1"),
    blue("unknown decay in the blueprint", "decay: cosine", "decay: stairs", "schedule", "wsd"),
    blue("floor above the peak", "decay: cosine", "decay: cosine, final_fraction: 1.5", "schedule", "must be <= 1, not 1.5"),
    blue("constant floor", "decay: cosine", "decay: constant, final_fraction: 0.1", "schedule", "constant never decays"),
    blue("wsd too long", "decay: cosine", "decay: wsd, decay_fraction: 0.95", "schedule", "more than all steps"),
    exp(
        "search an optimizer of matrices",
        "rank: {type: choice, values: [4, 8]}",
        "optimizer: {type: grid, values: [sgd, muon]}",
        "optimizer: {",
        "search.optimizer.values.1",
        "one flat row",
    ),
    exp(
        "search an unknown optimizer",
        "rank: {type: choice, values: [4, 8]}",
        "optimizer: {type: choice, values: [adagard]}",
        "optimizer: {",
        "did you mean 'adagrad'",
    ),
    exp(
        "search optimizers in a range",
        "rank: {type: choice, values: [4, 8]}",
        "optimizer: {type: uniform, low: 0, high: 1}",
        "optimizer: {",
        "optimizer is a word",
    ),
    exp(
        "search full dropout",
        "rank: {type: choice, values: [4, 8]}",
        "dropout: {type: uniform, low: 0, high: 1}",
        "dropout: {",
        "dropout must be at least 0 and below 1",
    ),
    exp(
        "search freeze in a range",
        "rank: {type: choice, values: [4, 8]}",
        "freeze_a: {type: uniform, low: 0, high: 1}",
        "freeze_a: {",
        "values: [true, false]",
    ),
    exp(
        "search freeze by a word",
        "rank: {type: choice, values: [4, 8]}",
        "freeze_a: {type: choice, values: [sometimes]}",
        "freeze_a: {",
        "'sometimes' is not true or false",
    ),
    exp(
        "search no ratio",
        "rank: {type: choice, values: [4, 8]}",
        "plus_ratio: {type: uniform, low: 0, high: 16}",
        "plus_ratio: {",
        "plus_ratio must be above 0",
    ),
    blue("twin targets", "[q_proj, v_proj]", "[q_proj, q_proj]", "lora:", "names a module twice"),
    blue(
        "microsteps",
        "rows_per_step: 4",
        "rows_per_step: 4\n  rows_per_microstep: 3",
        "lanes:",
        "multiple of rows_per_microstep (3)",
    ),
]

ASHA = "type: asha\n    grace_reports: 1\n    reduction_factor: 2"
RANGES = "  search:\n" + EXPERIMENT.partition("  search:\n")[2].partition("  epigenomes:")[0] + "  epigenomes:\n"
RANKS = "    rank: {type: choice, values: [4, 8]}"
SHARED = EXPERIMENT[EXPERIMENT.index(RANKS) : EXPERIMENT.index("evaluate:")]
NOTHING = "  epigenomes:\n    type: listed\n    mixes:\n      - {name: a, express: {code: 1}}\n  searcher: {type: optuna}\n"
SILENT = (
    "    type: levels\n    levels: {"
    + ", ".join(
        f"{domain}: {{type: choice, values: [0, 1]}}" for domain in ("code", "docstrings", "comments", "notes", "chats")
    )
    + "}\n"
)
LISTED = EXPERIMENT.partition("  epigenomes:\n")[2].partition("  scheduler:")[0]


def mixes(name: str, written: str, *words: str) -> Case:
    """The listed mixes replaced by another kind, in which the last line is wrong."""
    lines = written.splitlines()
    text = "".join(f"    {line}\n" for line in lines)
    return exp(name, LISTED, text, lines[-1], *words)


SEARCH = [
    exp("unknown searcher", "variants: 4", "searcher: {type: optona}\n  variants: 4", "optona", "did you mean 'optuna'"),
    exp("searcher as a word", "variants: 4", "searcher: sobol\n  variants: 4", "searcher: sobol", "is text", "with `type`"),
    exp("paired as a word", "variants: 4", "paired: maybe\n  variants: 4", "paired: maybe", "true or false was meant"),
    exp(
        "optuna with all variants at once",
        "variants: 4",
        "searcher: {type: optuna}\n  variants: 4",
        "variants: 4",
        "4 variants in 4 slots",
        "body: {slots: 1}",
    ),
    exp(
        "optuna with a scheduler that needs all",
        ASHA,
        "type: pbt\n  searcher: {type: optuna}",
        "type: pbt",
        "pbt wants all variants at once",
        "asha, median or fifo",
    ),
    exp("bohb without its searcher", ASHA, "type: bohb", "type: bohb", "searcher: {type: bohb}"),
    exp("bohb without its scheduler", "variants: 4", "searcher: {type: bohb}\n  variants: 4", "type: asha", "type: bohb"),
    exp(
        "optuna with a grid",
        "  search:\n    learning_rate: {type: log_uniform, low: 1e-4, high: 1e-2}\n",
        "  searcher: {type: optuna}\n  search:\n    learning_rate: {type: grid, values: [1e-3, 1e-2]}\n",
        "learning_rate: {type: grid",
        "search.learning_rate.type",
        "a grid is dealt; write type: choice",
    ),
    exp(
        "optuna of no random variant",
        "variants: 4",
        "searcher: {type: optuna, random_variants: 0}\n  variants: 4",
        "random_",
        "random_variants",
        "must be",
    ),
    exp(
        "optuna with a dirichlet mix",
        LISTED,
        "    type: dirichlet\n  searcher: {type: optuna}\n",
        "type: dirichlet",
        "epigenomes.type",
        "optuna could not learn from it",
        "type: levels",
    ),
    exp("optuna with nothing to search", RANGES + LISTED, NOTHING, "searcher:", "there is nothing to search"),
    exp("sobol with nothing to place", RANGES + LISTED, NOTHING.replace("optuna", "sobol"), "searcher:", "type: branch"),
    mixes("concentration of nothing", "type: dirichlet\nconcentrations: {code: 0}", "concentrations.code", "must be > 0"),
    mixes("concentration of an unknown domain", "type: dirichlet\nconcentrations: {cood: 1}", "did you mean 'code'"),
    mixes("a simplex of no step", "type: simplex_grid\nsteps: 0", "steps", "must be >= 1"),
    mixes(
        "a simplex larger than the population",
        "type: simplex_grid\nsteps: 2",
        "2 steps over 5 domains are 15 mixes, and there are 4 variants",
        "variants: 15",
    ),
    mixes("levels of nothing", "type: levels\nlevels: {}", "is empty"),
    mixes(
        "level of an unknown domain", "type: levels\nlevels: {cood: {type: uniform, low: 0, high: 1}}", "did you mean 'code'"
    ),
    mixes(
        "level below zero", "type: levels\nlevels: {code: {type: uniform, low: -1, high: 1}}", "levels.code.low", "at least 0"
    ),
    mixes("level as text", "type: levels\nlevels: {code: {type: choice, values: [1, loud]}}", "values.1", "'loud' is text"),
    mixes("level of no type", "type: levels\nlevels: {code: {low: 1, high: 2}}", "levels.code", "has no `type`"),
    mixes("level of an unknown key", "type: levels\nlevels: {code: {type: uniform, lo: 1, high: 2}}", "did you mean 'low'"),
    mixes("level twice", "type: levels\nlevels: {code: {type: grid, values: [1, 2, 1]}}", "holds a value twice"),
    exp(
        "grid of levels above variants",
        LISTED,
        "    type: levels\n    levels: {code: {type: grid, values: [1, 2, 3, 4, 5]}}\n",
        "variants: 4",
        "grid of 5 points (level of code 5)",
    ),
    exp("levels that may all be zero", LISTED, SILENT, "levels: {", "expresses nothing"),
    exp(
        "pb2 over a choice",
        RANGES + LISTED + "  scheduler:\n    " + ASHA,
        "  search:\n    learning_rate: {type: choice, values: [1e-3]}\n  epigenomes:\n" + LISTED + "  scheduler: {type: pb2}",
        "learning_rate: {type: choice",
        "pb2 proposes learning_rate between two ends",
    ),
    exp("pb2 without a range", ASHA, "type: pb2\n    mutate: [clip]", "mutate: [clip]", "no range for clip"),
    exp(
        "hyperband in waves",
        ASHA,
        "type: hyperband\n    reduction_factor: 2\nbody: {slots: 2}",
        "variants: 4",
        "halves whole brackets",
    ),
    exp("hyperband of one bracket", ASHA, "type: hyperband\n    reduction_factor: 1.3", "variants: 4", "fill only the bracket"),
    exp("hyperband without a halving", ASHA, "type: hyperband\n    reduction_factor: 5", "reports: 4", "less than one halving"),
]

BATCHES = [
    exp("batch of none", RANKS, f"{RANKS}\n    rows_per_step: {{type: choice, values: [0, 4]}}", "rows_per_step", "at least 1"),
    exp(
        "half a row", RANKS, f"{RANKS}\n    rows_per_step: {{type: grid, values: [2.5, 4]}}", "rows_per_step", "no whole number"
    ),
    exp("batch as text", RANKS, f"{RANKS}\n    rows_per_step: {{type: grid, values: ['2']}}", "rows_per_step", "'2' is text"),
    exp(
        "batch by uniform",
        RANKS,
        f"{RANKS}\n    rows_per_step: {{type: uniform, low: 2, high: 8}}",
        "rows_per_step",
        "rows_per_step is a whole number",
        "values: [2, 4, 8]",
    ),
    exp("one batch", RANKS, f"{RANKS}\n    rows_per_step: 8", "rows_per_step", "a mapping with `type`"),
    exp(
        "batches without a common report",
        RANKS,
        f"{RANKS}\n    rows_per_step: {{type: choice, values: [3, 5, 7]}}",
        "tokens_per_variant: 4096",
        "105 rows x 64 tokens: 105 rows are whole steps of 3, 5, 7",
        "write at least 26880",
    ),
    exp(
        "batches that workers cannot share",
        SHARED,
        SHARED.replace(RANKS, f"{RANKS}\n    rows_per_step: {{type: choice, values: [1, 4]}}") + "body: {workers: 2}\n",
        "body: {workers: 2}",
        "2 workers cannot share the 1 rows",
        "lanes.rows_per_microstep: 2",
    ),
    exp("pbt of batches", ASHA, "type: pbt\n    mutate: [rows_per_step]", "mutate: [rows", "'rows_per_step' is not known"),
]

CHATS = "- {type: jsonl, path: chats.jsonl, domain: chats}"

CONVERSATIONS = [
    exp(
        "missing chat template",
        "rng_seed: 17",
        "base: {type: pretrained, model: a/b, chat_template: chat.jinja}",
        "chat.jinja",
        "base.chat_template",
        "no file",
        "blueprints/chatml.jinja",
    ),
    exp(
        "another word for the template",
        "rng_seed: 17",
        "base: {type: pretrained, model: a/b, chat_template_path: chat.jinja}",
        "chat_template_path",
        "the name here is base.chat_template",
    ),
    exp(
        "text and conversations at once",
        CHATS,
        "- {type: jsonl, path: chats.jsonl, domain: chats, text_key: text, messages_key: messages}",
        "messages_key: messages",
        "text_key and messages_key",
        "leave one of them out",
    ),
    exp("no key at all", CHATS, CHATS.replace("}", ", messages_key: ''}"), "messages_key: ''", "messages_key", "is empty"),
    exp(
        "a key that is true", CHATS, CHATS.replace("}", ", messages_key: true}"), "messages_key: true", "true", "text was meant"
    ),
    exp(
        "conversations in a domain of text",
        CHATS,
        f"{CHATS}\n    - {{type: jsonl, path: chats.jsonl, domain: notes, messages_key: messages}}",
        "domain: notes, messages_key",
        "'notes' would hold conversations here, text in another source",
        "a domain of its own",
    ),
    exp(
        "text in a domain of conversations",
        CHATS,
        CHATS.replace("}", f", messages_key: m}}\n    {CHATS}"),
        CHATS + "\n  split",
        "'chats' would hold text here, conversations in another source",
    ),
    exp(
        "typo in messages_key", CHATS, CHATS.replace("}", ", message_key: m}"), "message_key: m", "did you mean 'messages_key'"
    ),
    exp(
        "axolotl field_messages",
        CHATS,
        CHATS.replace("}", ", field_messages: m}"),
        "field_messages",
        "the name here is genome.sources.messages_key",
    ),
    exp("a glob by another name", 'glob: "**/*.md"', "include: '*.md'", "include", "the name here is glob"),
    exp("messages of a folder", 'glob: "**/*.md"', "messages_key: m", "messages_key: m", "unknown key 'messages_key'"),
]

SYNTAX = [
    exp("key given twice", "rng_seed: 17", "name: other", "name: other", "the key is given twice", "first at"),
    exp("tab", "  variants: 4", "\tvariants: 4", "\tvariants", "a tab; YAML indents with spaces"),
    exp("unclosed list", "tags: [one, two]", "tags: [one, two", "", "not YAML", "flow sequence"),
    exp("unclosed quote", '"**/*.md"', '"**/*.md', "", "not YAML"),
    exp("two colons", "name: good", "name: good: better", "name: good: better", "a second ': '"),
    exp("no colon", "rng_seed: 17", "rng_seed 17", "rng_seed 17", "a line without ': '"),
    exp("cycle", "tags: [one, two]", "tags: &t [one, *t]", "tags: &t", "a cycle"),
    exp("unknown alias", "tags: [one, two]", "tags: *nowhere", "*nowhere", "no anchor before it"),
    exp("bomb", "# chrysalis run good.yaml\n", BOMB, "d: &d", "expands to", "at most 5000"),
    exp("ladder of aliases", "# chrysalis run good.yaml\n", LADDER, "a31:", "nested deeper than 32 levels"),
    exp("deep brackets", "tags: [one, two]", "tags: " + "[" * 5000, "tags: [[", "nested deeper than 32 levels"),
    exp("deep mappings", "tags: [one, two]", "tags: " + "{a: " * 3000, "tags: {a", "nested deeper than 32 levels"),
    exp(
        "python tag",
        "name: good",
        "name: !!python/object/apply:os.system [id]",
        "name: !!python",
        "tag '!!python/object/apply:os.system'",
    ),
    exp("own tag", "name: good", "name: !env HOME", "name: !env", "tag '!env' is not allowed"),
    exp("two documents", "population:\n", "---\npopulation:\n", "---", "a second document"),
    exp("merge key", "tags: [one, two]", "<<: {project: x}", "<<:", "merge key '<<'", "write the keys out"),
    exp("number as a key", "{code: 1, docstrings: 1}", "{1: 1}", "{1: 1}", "a key must be text"),
    exp("list as a key", "rng_seed: 17", "? [a, b]\n: 1", "? [a, b]", "a key is a word"),
    exp("control character", "name: good", "name: go\x07od", "name: go", "U+0007"),
    exp("surrogate", "name: good", 'name: "\\ud800"', "name:", "surrogate"),
    exp("escape beyond unicode", "name: good", 'name: "\\UFFFFFFFF"', "", "beyond all limits"),
    exp("endless number", "rng_seed: 17", "rng_seed: " + "9" * 5000, "rng_seed", "a number of 5000 characters"),
    exp("number beyond 64 bits", "rng_seed: 17", "rng_seed: 99999999999999999999", "rng_seed", "beyond 64 bits"),
    exp(
        "too large",
        "# chrysalis run good.yaml\n",
        "# " + "x" * 200_000 + "\n",
        "# xxx",
        "too many for a file that a person writes",
    ),
    exp("too many entries", "tags: [one, two]", "tags: [" + "x, " * 6000 + "]", "tags: [", "more than 5000 nodes"),
    blue("bomb in the blueprint", "# chrysalis run good.yaml\n", BOMB, "d: &d", "expands to"),
]

DIRICHLET = "type: dirichlet\n"


def bred(name: str, scheduler: str, epigenomes: str, at: str, *words: str) -> Case:
    """The listed mixes and the scheduler replaced; what is wrong stands in the line that holds `at`."""
    old = EXPERIMENT[EXPERIMENT.index(LISTED) : EXPERIMENT.index("evaluate:")]
    new = f"    {epigenomes}\n  scheduler: {scheduler}\n"
    return exp(name, old, new, at, *words)


EPIGENOMES = [
    mixes("prior of another word", DIRICHLET + "prior: sizes", "epigenomes.prior", "unknown prior 'sizes'", "temperature(T)"),
    mixes("prior without its number", DIRICHLET + "prior: temperature", "unknown prior 'temperature'"),
    mixes("prior of no temperature", DIRICHLET + "prior: temperature(0)", "unknown prior", "a number above 0"),
    mixes("prior of an endless temperature", DIRICHLET + "prior: temperature(1e999)", "a number above 0"),
    mixes("prior as a mapping", DIRICHLET + "prior: {unimax: 4}", "epigenomes.prior", "text was meant"),
    exp(
        "prior of one mix",
        "express: {chats: 2,",
        "prior: unimax\n        express: {chats: 2,",
        "prior: unimax",
        "mixes.1.prior",
    ),
    mixes("silence of nobody", DIRICHLET + "silence: [cod]", "epigenomes.silence.0", "did you mean 'code'"),
    mixes("silence as a word", DIRICHLET + "silence: code", "epigenomes.silence", "a list was meant: write [code]"),
    mixes("silence of everybody", DIRICHLET + 'silence: ["*"]', "silences every domain"),
    exp(
        "silence of all that a mix expresses",
        "express: {chats: 2,",
        "silence: [chats, notes]\n        express: {chats: 2,",
        "silence: [chats",
        "mixes.1.silence",
        "silences all that 'talk' expresses",
    ),
    mixes("floor of an unknown domain", DIRICHLET + "floors: {cood: 0.1}", "floors.cood", "did you mean 'code'"),
    mixes("floor below zero", DIRICHLET + "floors: {code: -0.1}", "floors.code", "must be > 0"),
    mixes("floor of everything", DIRICHLET + "floors: {code: 1}", "floors.code", "must be < 1"),
    mixes("floor that is no number", DIRICHLET + "floors: {code: .nan}", "floors.code", "not a finite number"),
    mixes("floor too fine to keep", DIRICHLET + "floors: {code: 0.0001}", "floors.code", "write 0.00025"),
    mixes("floors above one", DIRICHLET + 'floors: {"*": 0.3}', "epigenomes.floors", "sum to 1.5"),
    mixes("floor of the silenced", DIRICHLET + "silence: [code]\nfloors: {code: 0.1}", "floors.code", "is silenced"),
    mixes("caps as a number", DIRICHLET + "caps: 4", "epigenomes.caps", "a mapping was meant"),
    mixes("cap of no epoch", DIRICHLET + "caps: {code: 0}", "caps.code", "must be > 0"),
    mixes("loss weight of nothing", DIRICHLET + "loss_weights: {code: 0}", "loss_weights.code", "must be > 0"),
    mixes("loss weight beyond all sums", DIRICHLET + "loss_weights: {code: 1e308}", "loss_weights.code", "must be <= "),
    mixes("stage beyond all sums", DIRICHLET + "stages: [{at: 0.5, express: {code: 1e308}}]", "express.code", "must be <= "),
    mixes(
        "levels beyond all sums",
        "type: levels\nlevels: {code: {type: uniform, low: 1, high: 1e308}}",
        "code.high",
        "at most 1e+12",
    ),
    mixes("loss weight as text", DIRICHLET + 'loss_weights: {code: "2"}', "loss_weights.code"),
    mixes("loss weight of nobody", DIRICHLET + "loss_weights: {codes: 2}", "loss_weights.codes", "did you mean 'code'"),
    mixes("replay without a share", DIRICHLET + "replay: {express: {code: 1}}", "replay.share", "is missing"),
    mixes("replay of everything", DIRICHLET + "replay: {share: 1}", "replay.share", "must be < 1"),
    mixes("replay of nothing", DIRICHLET + "replay: {share: 0.5, express: {code: 0}}", "the replay expresses nothing"),
    mixes("replay of nobody", DIRICHLET + "replay: {share: 0.5, express: {cod: 1}}", "express.cod", "did you mean 'code'"),
    mixes(
        "replay of the silenced", DIRICHLET + "silence: [code]\nreplay: {share: 0.5, express: {code: 1}}", "that are silenced"
    ),
    mixes("stage of no place", DIRICHLET + "stages: [{express: {code: 1}}]", "stages.0", "write one of them"),
    mixes("stage of two places", DIRICHLET + "stages: [{at: 0.5, at_tokens: 9, express: {code: 1}}]", "write one of them"),
    mixes("stage before all", DIRICHLET + "stages: [{at: 0, express: {code: 1}}]", "stages.0.at", "must be > 0"),
    mixes("stage after all", DIRICHLET + "stages: [{at_tokens: 4096, express: {code: 1}}]", "at_tokens", "step 16 of 16"),
    mixes(
        "stages out of order",
        DIRICHLET + "stages: [{at: 0.5, express: {code: 1}}, {at_tokens: 1024, express: {code: 2}}]",
        "stages.1.at_tokens",
        "begins with step 4 of 16, not after the one before (8)",
    ),
    mixes(
        "stages of one step",
        DIRICHLET + "stages: [{at: 0.5, express: {code: 1}}, {at: 0.5, express: {code: 2}}]",
        "stages.1.at",
        "not after",
    ),
    mixes(
        "stage of silence",
        DIRICHLET + 'silence: ["[!c]*", chats]\nstages: [{at: 0.5, express: {code: 0, comments: 0}}]',
        "every level at 0",
    ),
    mixes(
        "level of the silenced",
        "type: levels\nsilence: [code]\nlevels: {code: {type: uniform, low: 1, high: 2}}",
        "levels.code",
        "is silenced",
    ),
    mixes("stage of nobody", DIRICHLET + "stages: [{at: 0.5, express: {cod: 1}}]", "express.cod", "did you mean 'code'"),
    mixes("stage of no level", DIRICHLET + "stages: [{at: 0.5, express: {}}]", "stages.0.express", "is empty"),
    mixes("stage below zero", DIRICHLET + "stages: [{at: 0.5, express: {code: -1}}]", "express.code", "must be >= 0"),
    mixes("stage with a typo", DIRICHLET + "stages: [{at_token: 64, express: {code: 1}}]", "did you mean 'at_tokens'"),
    mixes("stage of the silenced", DIRICHLET + "silence: [co*]\nstages: [{at: 0.5, express: {code: 1}}]", "'code' is silenced"),
    mixes(
        "match of a shorter run", DIRICHLET + "match: {repetition: 100}", "match.repetition", "shorter than a variant (4096)"
    ),
    mixes("match as a word", DIRICHLET + "match: repetition", "epigenomes.match", "a mapping was meant"),
    bred("strength without levels", "{type: pbt, level_strength: 0.3}", DIRICHLET.strip(), "level_str", "does not name levels"),
    bred(
        "strength of nothing", "{type: pbt, mutate: [levels], level_strength: 0}", DIRICHLET.strip(), "level_str", "must be > 0"
    ),
    bred("levels without strength", "{type: pbt, mutate: [levels]}", DIRICHLET.strip(), "levels]", "or level_strength: 0.3"),
    bred(
        "a stage of bred levels",
        "{type: pbt, mutate: [levels], level_strength: 0.3}",
        "type: dirichlet\n    stages: [{at: 0.5, express: {code: 1}}]",
        "stages:",
        "pbt changes the level of 'code' as well",
    ),
    bred(
        "a stage of searched levels",
        "{type: pbt, mutate: [levels]}",
        "type: levels\n    levels: {code: {type: uniform, low: 1, high: 2}}\n    stages: [{at: 0.5, express: {code: 1}}]",
        "stages:",
        "pbt changes the level of 'code' as well",
    ),
]


def third(name: str, written: str, *words: str) -> Case:
    """One more mix below the two of the good experiment."""
    old = "        express: {chats: 2, notes: 0.5}\n"
    return exp(name, old, f"{old}      - {written}\n", written, *words)


PARENTS = [
    third("mix of no origin", "{name: c}", "mixes.2", "write one of them"),
    third("mix of two origins", "{name: c, like: even, cross: [even, talk]}", "mixes.2", "write one of them"),
    third("mix like nobody", "{name: c, like: evne}", "mixes.2.like", "did you mean 'even'", "known: even, talk"),
    third("mix like itself", "{name: c, like: c}", "mixes.2.like", "'c' is made of itself"),
    exp("mix like one below", "express: {code: 1, docstrings: 1}", "like: talk", "like: talk", "stands above 'talk'"),
    third("mix from another", "{name: c, from: even}", "unknown key 'from'; the name here is", "mixes.like"),
    third("cross of one", "{name: c, cross: [even]}", "mixes.2.cross"),
    third("cross as a word", "{name: c, cross: even}", "mixes.2.cross", "a list was meant"),
    third("cross of nobody", "{name: c, cross: [even, tolk]}", "mixes.2.cross", "did you mean 'talk'"),
    third("cross with itself", "{name: c, cross: [even, even]}", "mixes.2.cross", "write like: even"),
    third("weight of no cross", "{name: c, like: even, weight: 0.3}", "mixes.2", "or write the cross"),
    third("weight of everything", "{name: c, cross: [even, talk], weight: 1}", "mixes.2.weight", "must be < 1"),
    third("dim of what is not expressed", "{name: c, like: even, dim: {chats: 2}}", "dim.chats", "'c' expresses no 'chats'"),
    third("dim to nothing", "{name: c, like: even, dim: {code: 0}}", "dim.code", "must be > 0"),
    third("dim as a list", "{name: c, like: even, dim: [code]}", "mixes.2.dim", "a mapping was meant"),
    third("brighten without end", "{name: c, like: even, brighten: {code: .inf}}", "brighten.code", "not a finite number"),
    third("swap of one", "{name: c, like: even, swap: [code, docstrings]}", "mixes.2.swap.0"),
    third("swap with itself", "{name: c, like: even, swap: [[code, code]]}", "mixes.2.swap.0", "with itself"),
    third("swap of a stranger", "{name: c, like: even, swap: [[code, docstring]]}", "swap.0", "did you mean 'docstrings'"),
    third("mutation of nothing", "{name: c, like: even, mutate: 0}", "mixes.2.mutate", "must be > 0"),
    third("brightened silence", "{name: c, like: even, silence: [code], brighten: {code: 2}}", "'code' is silenced"),
    exp(
        "a factor of nothing",
        "express: {chats: 2, notes: 0.5}",
        "express: {chats: 2, notes: 0}\n      - {name: c, like: talk, brighten: {notes: 9}}",
        "{name: c",
        "brighten.notes",
        "stands at level 0",
    ),
    exp(
        "parents of different floors",
        "express: {chats: 2, notes: 0.5}",
        "floors: {chats: 0.1}\n        express: {chats: 2}\n      - {name: c, cross: [even, talk]}",
        "{name: c",
        "differ in `floors`",
        "write the floors of 'c'",
    ),
    exp(
        "parents of different priors",
        "express: {chats: 2, notes: 0.5}",
        "prior: size\n        express: {chats: 2}\n      - {name: c, cross: [even, talk], prior: size}",
        "{name: c",
        "differ in `prior`",
        "mixes of one prior",
    ),
    exp(
        "an inherited floor of the silenced",
        "express: {chats: 2, notes: 0.5}",
        "floors: {chats: 0.1}\n        express: {chats: 2, notes: 1}\n      - {name: c, like: talk, silence: [chats]}",
        "floors: {chats",
        "mixes.1.floors.chats",
        "'chats' is silenced",
    ),
]

CASES = [
    *TYPOS, *PACKED, *OTHER_TRAINERS, *TYPES, *UNIONS, *RULES, *SEARCH, *EPIGENOMES, *PARENTS, *BATCHES, *CONVERSATIONS, *SYNTAX
]  # fmt: skip
