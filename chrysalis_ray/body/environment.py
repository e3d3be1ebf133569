"""What the processes of Ray find in their environment."""

from __future__ import annotations

# Ray Train's controller and Tune read these when they start.
ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",  # it would set up the logging of the process it runs in: the driver
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that is late must not start another Ray
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_DEDUP_LOGS": "1",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # what ends a body is told once, by us
    "TOKENIZERS_PARALLELISM": "false",
    "GOMP_SPINCOUNT": "1000",  # see cli/main.py
    "PYTHONHASHSEED": "0",
}
