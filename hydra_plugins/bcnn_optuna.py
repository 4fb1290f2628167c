"""A sweep by Optuna: which values to try next is drawn from what those before them reached.

Not hydra-optuna-sweeper: that asks for Optuna 2, whose storage fails with today's SQLAlchemy, and
cannot go on with a sweep that was interrupted.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from bcnn.training.sweep import COMMAND, told
from bcnn.utils.errors import UserError

STUDY = "study.log"  # in the sweep's folder: Optuna's journal


class OptunaSweeper(Sweeper):
    """Maximises what jobs return.

    Args:
        jobs: in all, those of an interrupted sweep in the same folder among them.
        at_once: jobs whose values are drawn together.
        seed: with that of the jobs before it, a job's values depend on this alone.
        space: values of options in Hydra's grammar of sweeps, as `tag(log,interval(1e-3,1))`; what the
            command says of an option goes before it.
    """

    def __init__(self, jobs: int, at_once: int, seed: int, space: Mapping[str, Any]) -> None:
        self.jobs, self.at_once, self.seed, self.space = jobs, at_once, seed, space

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        told(self._sweep, arguments)

    def _sweep(self, arguments: list[str]) -> None:
        """Run jobs until there are enough.

        Raises:
            UserError: no option has values to choose from.
        """
        import optuna  # takes a while
        from optuna.storages.journal import JournalFileBackend

        assert self.config is not None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        fixed, space = self._options(arguments)
        folder = Path(self.config.hydra.sweep.dir)
        OmegaConf.save(self.config, folder / COMMAND)
        journal = JournalFileBackend(str(folder / STUDY))
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(journal),
            study_name="sweep",
            direction="maximize",
            load_if_exists=True,
        )
        while batch := self._next_trials(study, space):
            self._launch(study, batch, fixed)

    def _options(self, arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
        """Overrides of all jobs, and distributions by an option's name."""
        assert self.hydra_context is not None
        words = [*(f"{name}={values}" for name, values in self.space.items()), *arguments]
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        given = {override.get_key_element(): override for override in parser.parse_overrides(words)}
        space = {name: _distribution(each) for name, each in given.items() if each.is_sweep_override()}
        if not space:
            raise UserError(
                "sweep=optuna has nothing to search: give an option several values, as data.size="
                "224,448 or 'last.optimizer.lr=tag(log,interval(0.1,30))'"
            )
        return [
            f"{name}={each.get_value_element_as_str()}"
            for name, each in given.items()
            if name not in space
        ], space

    def _next_trials(self, study: Any, space: dict[str, Any]) -> list[Any]:
        """Those that a sweep was interrupted in, with their numbers; then new ones."""
        import optuna

        running = [optuna.trial.TrialState.RUNNING]
        begun = study.get_trials(states=running)
        count = min(self.at_once, self.jobs - len(study.trials) + len(begun))
        for _ in range(count - len(begun)):
            seed = self.seed + len(study.trials)  # one for all would begin again when gone on with
            study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=self.at_once > 1)
            study.ask(space)
        return list(study.get_trials(states=running)[: max(0, count)])

    def _launch(self, study: Any, trials: list[Any], fixed: list[str]) -> None:
        jobs = [
            [*fixed, *(f"{name}={_text(value)}" for name, value in trial.params.items())]
            for trial in trials
        ]
        assert self.launcher is not None
        self.validate_batch_is_legal(jobs)
        returns = self.launcher.launch(jobs, initial_job_idx=trials[0].number)
        for trial, each in zip(trials, returns, strict=True):
            value = float(each.return_value)
            failed = {"state": type(trial.state).FAIL}
            study.tell(trial.number, **(failed if math.isnan(value) else {"values": value}))


def _distribution(override: Override) -> Any:
    from optuna import distributions

    values = override.value()
    if not isinstance(values, IntervalSweep):
        return distributions.CategoricalDistribution(tuple(override.sweep_string_iterator()))
    low, high, log = values.start, values.end, "log" in values.tags
    assert low is not None and high is not None
    if isinstance(low, int) and isinstance(high, int):
        return distributions.IntDistribution(low, high, log=log)
    return distributions.FloatDistribution(low, high, log=log)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
