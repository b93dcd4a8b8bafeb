"""A good recipe for the tests of this folder to break, and how they break it."""

GOOD = """\
name: A good recipe
cite: Nobody 2020
seed: 0
tasks: {block: sinusoid, shots: 5, queries: 5}
model:
  block: mlp
  hidden: [8]
inner:
  steps: 2
  adapt: ["*"]
  rule:
    - {block: learning_rate, init: 0.01, learn: true}
  order: {block: truncated, last: 1}
outer:
  step_loss: {block: final}
  estimator: {block: unrolled}
  optimizer: {block: adam, lr: 1e-3, groups: {"rule.*": {lr: 1e-4}}}
  schedule: {block: cosine, final: 0.0}
  tasks_per_step: 4
  steps_per_epoch: 3
  epochs: 2
evaluation: {tasks: 10, every: 1, inner_steps: 3}
hardware: {device: cpu, executor: {block: loop}, precision: float64}
"""


def broken(*changes: tuple[str, str]) -> str:
    """The good recipe with every `(old, new)` applied, each of which must occur once."""
    text = GOOD
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
        text = text.replace(old, new)
    return text
