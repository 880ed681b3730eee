"""Our policies and our Meta-World robots in lerobot's own programs.

The distribution `lerobot_policy_omega_qvla`, which lerobot imports because of its name, imports the first two. The
policy and its processors are then found by the names of modules (`configuration_`, `modeling_`, `processor_`).

configuration_omega_qvla   what `config.json` of a quantized checkpoint says
environment                `--env.type=omega_qvla_metaworld`: the episodes of `omega-qvla evaluate`
modeling_omega_qvla        the policy: a queue of actions around `Policy.infer`
processor_omega_qvla       the pipelines of a policy that is not opened by `--policy.path`
episode_key                how the environment tells the policy which noise an episode meets
"""
