"""Makes a pipeline fast: plans, preparation, CUDA graphs, memory, staging. Tensors only; files belong to the batch job.

plan.py      what runs: the key of everything captured, printable
count.py     what a plan costs, counted without running it
prepare.py   the engine's modules over the pipeline's weights
region.py    degraded pixels to restored pixels as tensor operations: what a graph holds, and its static buffers
graphs.py    capture, one pool, a budget, eviction
memory.py    how many photos fit; what to do when they do not
lanes.py     photos side by side on a CPU
tiles.py     photos of any size as rows of a bucket, and back
staging.py   queue, streams and pinned memory beside the replays
engine.py    Engine: restore, submit, load_state_dict, statistics
"""

from .count import Estimate, estimate
from .engine import Engine, OutOfMemory, Restored
from .graphs import CaptureError
from .plan import Plan

__all__ = ["CaptureError", "Engine", "Estimate", "OutOfMemory", "Plan", "Restored", "estimate"]
