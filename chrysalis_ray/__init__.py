"""chrysalis_ray: grow a population of LoRA variants on a Ray cluster and merge it into one adapter.

The command line (``chrysalis``) is the front door; ``chrysalis_ray.lifecycle.grow`` is the same story in Python.
Importing this package imports neither torch nor Ray.
"""

__version__ = "0.1.0"
