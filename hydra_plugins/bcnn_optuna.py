"""A sweeper by Optuna, which draws the values of later jobs from the results of earlier ones.

hydra-optuna-sweeper is not used: it needs Optuna 2, whose storage fails with today's SQLAlchemy, and
it cannot continue an interrupted sweep. Options have the same names here.
"""

import math
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import OmegaConf

from bcnn.training.sweep import COMMAND
from bcnn.utils.errors import UserError

STUDY = "study.log"  # Optuna's journal, in the sweep's folder


class OptunaSweeper(BasicSweeper):
    """Maximise what jobs return; conf/hparams_search/optuna.yaml describes the options.

    The values of a job depend on the seed and on the results of earlier jobs. Options on the command
    line take precedence over `params`.
    """

    def __init__(self, n_trials: int, n_jobs: int, seed: int, params: dict[str, str]) -> None:
        super().__init__(max_batch_size=n_jobs, params=params)
        self.n_trials, self.n_jobs, self.seed = n_trials, n_jobs, seed

    def sweep(self, arguments: list[str]) -> None:
        """Run jobs until there are `n_trials`."""
        import optuna  # not at the top: Hydra imports this module for every command
        from optuna.storages.journal import JournalFileBackend

        assert self.config and self.hydra_context and self.launcher
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        given = {each.get_key_element(): each for each in overrides}  # the last of an option counts
        space = {name: _distribution(each) for name, each in given.items() if each.is_sweep_override()}
        fixed = [str(each.input_line) for name, each in given.items() if name not in space]
        if not space:
            raise UserError("hparams_search=optuna has nothing to search: vary an option")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        folder = Path(self.config.hydra.sweep.dir)
        OmegaConf.save(self.config, folder / COMMAND)
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(JournalFileBackend(str(folder / STUDY))),
            study_name="sweep",
            direction="maximize",
            load_if_exists=True,
        )
        while trials := self._next_trials(study, space):
            jobs = []
            for each in trials:
                pairs = each.params.items()
                drawn = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in pairs)
                jobs.append([*fixed, *drawn])
            self.validate_batch_is_legal(jobs)
            returns = self.launcher.launch(jobs, initial_job_idx=trials[0].number)
            for trial, job in zip(trials, returns, strict=True):
                failed = math.isnan(value := float(job.return_value))
                state = optuna.trial.TrialState.FAIL if failed else None
                study.tell(trial.number, None if failed else value, state)

    def _next_trials(self, study: Any, space: dict[str, Any]) -> list[Any]:
        """Return the trials that an interruption left unfinished, then new ones; `n_jobs` at most."""
        import optuna

        unfinished = [optuna.trial.TrialState.RUNNING]
        begun = len(study.get_trials(states=unfinished))
        count = max(0, min(self.n_jobs, self.n_trials - len(study.trials) + begun))
        for _ in range(count - begun):
            seed = self.seed + len(study.trials)  # a constant seed would repeat values after a resume
            study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=self.n_jobs > 1)
            study.ask(space)
        return list(study.get_trials(states=unfinished)[:count])


def _distribution(override: Override) -> Any:
    from optuna import distributions

    values = override.value()
    if not isinstance(values, IntervalSweep):
        return distributions.CategoricalDistribution(tuple(override.sweep_string_iterator()))
    integers = isinstance(values.start, int) and isinstance(values.end, int)
    kind: Any = distributions.IntDistribution if integers else distributions.FloatDistribution
    return kind(values.start, values.end, log="log" in values.tags)
