"""Shortcuts past Hydra's public functions: all that ties kd-cli to one version of Hydra.

Hydra composes each job of a sweep twice from its YAML files and copies each configuration five times, about 100 ms a
job; with the shortcuts it is 30 ms. Each shortcut checks the version, the names and the signatures that it relies on.
Where one is missing, or with KD_HYDRA_INTERNALS=0 in the environment, Hydra's own path is taken: slower, same results.
"""
