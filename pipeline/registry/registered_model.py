"""A registered model: its versions and aliases in MLflow, and the ledger, which must agree with them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipeline.errors import UserError
from pipeline.registry.ledger import Champion, Event, Ledger
from pipeline.tracking.models import command_about
from pipeline.tracking.tracker import MlflowTracker

CHAMPION, PREVIOUS = "champion", "previous"  # aliases
TOKEN_TAG = "promotion"  # of a version: the token of the change that made it


@dataclass(frozen=True)
class Registry:
    """One registered model in MLflow's registry, and the ledger of what may happen to it."""

    tracker: MlflowTracker
    ledger: Ledger
    model: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w][\w.-]{0,99}", self.model):
            rule = "should be letters, digits, - _ and . only, and start with no sign"
            raise UserError(f"`--model` {self.model}", rule)

    def command(self, text: str) -> str:
        """A command about this model, for an error's remedy."""
        return command_about(self.model, text)

    @property
    def elsewhere(self) -> UserError | None:
        """That the ledger is about another tracking store: of the model's runs that it names, this one knows none.

        Where a run was removed for good, its version still tells that it was here.
        """
        runs = {event.run for event in self.ledger.events(self.model)}
        if not runs or any(self.tracker.store.run(run) or self._versions(run) for run in runs):
            return None
        return UserError(
            self.model,
            f"none of its runs that the ledger names ({self.ledger.home}) is in this tracking store",
            "`--tracking-uri` says where they are; where they and the versions were removed for good, `--model NAME` begins "
            "another model",
        )

    def alias(self, name: str) -> str | None:
        """The version that an alias names, or None."""
        try:
            return str(self.tracker.client.get_model_version_by_alias(self.model, name).version)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def set_alias(self, alias: str, version: str | None) -> None:
        """Make an alias name this version, or remove it where that is None."""
        client = self.tracker.client
        if version is not None:
            client.set_registered_model_alias(self.model, alias, version)
        elif self.alias(alias) is not None:
            client.delete_registered_model_alias(self.model, alias)

    def version_made_by(self, begun: Event) -> str | None:
        """The version that an interrupted change was about, or had already made; None where it isn't there."""
        if begun.version is not None:
            return begun.version if self._exists(Champion(begun.version, begun.run)) else None
        versions = [v for v in self._versions(begun.run) if v.tags.get(TOKEN_TAG) == begun.details["token"]]
        return str(versions[0].version) if versions else None

    def version_of(self, run: str) -> str | None:
        """The newest version that is this run's, or None."""
        numbers = [int(version.version) for version in self._versions(run) if version.name == self.model]
        return str(max(numbers)) if numbers else None

    def run_of(self, version: str) -> str:
        """The run of a version; UserError where there is no such version, it is of no run, or no promotion made it."""
        found = self._find(version)
        if found is None or not found.run_id:
            rule = f"{self.model} has no such version of a run"
            raise UserError(f"`--version {version}`", rule, "`ui` shows those there are")
        if TOKEN_TAG not in found.tags:
            rule = "was registered by hand and never evaluated"
            remedy = f"`{self.command(f'promote --run {found.run_id}')}` evaluates its run"
            raise UserError(f"`--version {version}`", rule, remedy)
        return str(found.run_id)

    def champion(self) -> Champion | None:
        """The ledger's. UserError, with the ways out, where MLflow's alias names another version: somebody moved it.

        UserError, too, where it is in another tracking store.
        """
        champions = self.ledger.champions(self.model)
        if champions and (error := self.elsewhere):
            raise error
        champion = champions[-1] if champions else None
        aliased = self.alias(CHAMPION)
        if aliased == (champion.version if champion else None):
            return champion
        if name := self._new_name(champions):
            raise UserError(
                self.model,
                f"is called {name} in MLflow, and the ledger ({self.ledger.home}) knows it by the old name",
                f"rename it back there, or `--model {name}` begins a ledger of its own",
            )
        raise UserError(
            self.model,
            f"MLflow's alias champion names {version_label(aliased)}, but by the ledger ({self.ledger.home}) the champion is "
            f"{version_label(champion.version if champion else None)}: it was moved or deleted in MLflow, or from another "
            "folder mlruns",
            details=list(self._ways_out(aliased, champion)),
        )

    def _ways_out(self, aliased: str | None, champion: Champion | None) -> Iterator[str]:
        """Where the alias names another version than the ledger."""
        found = self._find(aliased) if aliased else None
        if found and TOKEN_TAG not in found.tags:
            yield f"{version_label(aliased)} was registered by hand: remove its alias champion in MLflow"
        elif found:
            yield f"`{self.command(f'rollback --version {aliased}')}` with a `--reason` takes MLflow's"
        if champion:
            yield f"`{self.command(f'rollback --version {champion.version}')}` with a `--reason` takes the ledger's"

    def deleted(self) -> list[Champion]:
        """The versions that were champion, by the ledger, and that, or whose run, MLflow has no more."""
        deleted = [c for c in dict.fromkeys(self.ledger.champions(self.model)) if not self._exists(c)]
        return [] if deleted and (self._new_name(deleted) or self.elsewhere) else deleted

    def _new_name(self, champions: Sequence[Champion]) -> str | None:
        """What the registered model is called, where a person renamed it: these versions are under that name."""
        if self.tracker.client.search_registered_models(f"name = '{self.model}'"):
            return None
        known = {(champion.version, champion.run) for champion in champions}
        versions = [version for run in {champion.run for champion in champions} for version in self._versions(run)]
        return next((v.name for v in versions if (str(v.version), v.run_id) in known), None)

    def _exists(self, champion: Champion) -> bool:
        version = self._find(champion.version)
        # A model that was deleted and made again counts its versions from 1. A version's files lie in its run.
        is_it = version is not None and version.run_id == champion.run
        return is_it and self.tracker.store.run(champion.run) is not None

    def _find(self, version: str) -> ModelVersion | None:
        try:
            return self.tracker.client.get_model_version(self.model, version)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _versions(self, run: str) -> list[ModelVersion]:
        return promoted_versions(self.tracker, run)


def promoted_versions(tracker: MlflowTracker, run: str) -> list[ModelVersion]:
    """The versions, of any registered model, that promotions made of a run: all have the same files.

    One that a person registered has no digests and is never served.
    """
    versions = tracker.client.search_model_versions(f"run_id = '{run}'")
    return [version for version in versions if TOKEN_TAG in version.tags]


def version_label(number: str | None) -> str:
    """`version 3`, or `no version`."""
    return "no version" if number is None else f"version {number}"
