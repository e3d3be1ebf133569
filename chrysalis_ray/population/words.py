"""The words that pass between Tune's driver and its trials. Apart, because a trial process imports little else."""

METRIC, MODE = "select_loss", "min"
DIVERGED = 1e9  # nats; what schedulers hear of a loss that is no number: worse than any, and safe to average
LEVEL = "level."  # `level.<domain>` in a search space is the level of that domain
MIX = "mix"  # in a search space: which of the mixes that are written or listed
TUNES = "__"  # how the names begin under which Tune adds to a trial's config
TRIAL = "__trial_info__"  # `ray.tune.result.TRIAL_INFO`: the trial's id, as `tuned.py` sends it
