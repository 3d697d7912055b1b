"""Training of the three stages: `lpmrf-fast train vae|posterior-mean|flow --config FILE`."""


def run(stage: str, config_path, overrides=()) -> None:
    """Train one stage ("vae", "posterior-mean" or "flow") as a YAML file says; continues a run that was stopped.

    Raises ConfigError for settings that cannot be used, FileNotFoundError for missing data.
    """
    from .config import STAGES, ConfigError, load_config
    from .trainer import Trainer

    if stage not in STAGES:
        raise ConfigError(f"no stage {stage!r}; there are {', '.join(STAGES)}")
    trainer = Trainer(stage, load_config(config_path, list(overrides)))
    try:
        trainer.fit()
    finally:
        trainer.close()
