"""Training: one jitted step under a mesh, and the loop around it.

train              the whole run: data, state, steps, checkpoints, validation (loop.py)
evaluate_workdir   validation loss of a run's latest checkpoint under any recipe (validation.py)
make_mesh          the devices as a grid of Auto axes data, fsdp, tensor; where parameters and batches live (mesh.py)
TrainState         step, parameters, optimizer state; created in shards (state.py)
make_optimizer     AdamW with warm-up + cosine, clipping, decay on matrices (optimizer.py)
make_train_step    gradients over microbatches and the update, one compilation (step.py)
make_health_step   statistics of all operands and the exact gradient, every config.health.every steps (health.py)
"""

from fp4jax.training.health import make_health_step
from fp4jax.training.loop import train
from fp4jax.training.mesh import make_mesh
from fp4jax.training.optimizer import learning_rate_schedule, make_optimizer
from fp4jax.training.state import ModelTemplate, TrainState, create_state, model_template
from fp4jax.training.step import make_loss_step, make_train_step
from fp4jax.training.validation import evaluate_workdir

__all__ = [
    "ModelTemplate",
    "TrainState",
    "create_state",
    "evaluate_workdir",
    "learning_rate_schedule",
    "make_health_step",
    "make_loss_step",
    "make_mesh",
    "make_optimizer",
    "make_train_step",
    "model_template",
    "train",
]
