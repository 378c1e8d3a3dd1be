"""Simulators, one file each: environment, observation in the policy's words, constants of the protocol.

Nothing is imported here: `vla0_trl.envs.pusht` loads gym-pusht, `vla0_trl.envs.libero` loads LIBERO, and
`import vla0_trl` loads neither.
"""
