"""The config layer: YAML groups that Hydra composes, and the dataclasses that type them.

configs/*.yaml -> schema.load -> Config -> scripts/

    typed.py     a mapping and a dataclass -> a checked instance, with errors that name the key
    sections.py  one frozen dataclass per group that no package owns (model, data, trainer, ...)
    schema.py    the root dataclass, the checks between groups, and load(): the only meeting point of Hydra and code
"""
