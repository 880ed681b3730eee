"""Whether a quantized policy still works: action error, closed-loop success, latency, and the report of them.

seeds        which seeds belong to training, calibration, held-out observations and evaluation
benchmark    what policies are judged on: tasks, limits, initial states
metaworld    the default benchmark, and the same simulator as lerobot shows it
libero       the papers' benchmark, and how other harnesses run it
rollout      closed-loop episodes, several robots in lockstep
recording    observations and frames kept of a rollout
jobs         rollouts of several policies over workers
workers      where independent jobs run: processes of this machine, or a Ray cluster
fidelity     action error against the reference policy
layer_error  how far each quantized linear is from the one that it replaces
traces       actions of all policies along an episode of the reference
latency      milliseconds of one inference
memory       resident memory of a process that loaded a policy
statistics   intervals and paired tests
results      everything found, and its JSON file
run          all of it in one call
report       table, Markdown and HTML, with the plots of `plots`
"""
