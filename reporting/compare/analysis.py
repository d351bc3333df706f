"""Numbers of a comparison: scores with intervals, tests, fairness, ranks and cost, as tidy tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedseg.common.text import count
from fedseg.evaluation.heterogeneity import update_differences
from fedseg.evaluation.statistics import (
    DECIMALS,
    Bootstrap,
    Interval,
    PairedTest,
    Ranking,
    block_ranks,
    bootstrap,
    by_patient,
    fairness,
    holm,
    paired,
    rank_stability,
    ranking,
    seed_means,
    site_mean,
    wins,
)
from fedseg.reporting.compare.clock import TOGETHER
from fedseg.reporting.compare.gather import TUNED, Gathered, Method
from fedseg.reporting.compare.options import Options
from fedseg.reporting.compare.runs import Run
from fedseg.reporting.summary import CHECKPOINTS, OWN_STATISTICS

GLOBAL, PERSONAL = "global", "personal"
LOCAL, POOLED, REFERENCE = "local", "pooled", "fedavg"
BASELINES = (LOCAL, POOLED)
OVERALL = "mean over sites"
AGAINST_GLOBAL, AGAINST_LOCAL, AGAINST_REFERENCE = "personal against global", "against local training", "against FedAvg"
AGAINST_OWN_STATISTICS = "against FedAvg with the site's own normalisation statistics"
"""Questions of the tests."""
Sites = dict[str, pd.DataFrame]  # site -> seeds x (patient, case), NaN where a seed did not test a case


class Model(NamedTuple):
    """One model that answers: a method's view."""

    method: str
    view: str

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.method} {self.view}"


class Tuned(NamedTuple):
    """A method as it comes and tuned, and of both the model that answers."""

    plain: Method
    tuned: Method
    before: Model
    after: Model

    @property
    def label(self) -> str:
        """For people; a method may be tuned with several budgets."""
        return f"{self.plain.label} {self.after.view}, {self.tuned.settings['training.trials']} trials"

    def found(self) -> dict[str, tuple[Any, Any]]:
        """Setting -> its value as the method comes, and what tuning found instead."""
        before, after = self.plain.settings, self.tuned.settings
        keys = sorted({*before, *after} - {"training.trials"})
        return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


@dataclass(frozen=True)
class Analysis:
    """A comparison's numbers, each computed when it is first asked for.

    Attributes:
        gathered: the runs.
        options: what is asked.
        seen: whether it is about sites that took part, or about those that did not.
    """

    gathered: Gathered
    options: Options
    seen: bool = True

    # --- scores -------------------------------------------------------------------------------------------------------

    def scores(self, checkpoint: str, split: str, *, seen: bool) -> dict[Model, Sites]:
        """Every model's scores at every site."""
        asked = checkpoint, split, seen
        if asked not in self._asked:
            self._asked[asked] = self._scores(*asked)
        return self._asked[asked]

    @cached_property
    def _asked(self) -> dict[tuple[str, str, bool], dict[Model, Sites]]:
        return {}

    def _scores(self, checkpoint: str, split: str, seen: bool) -> dict[Model, Sites]:
        cases = self.gathered.cases
        rows = cases[
            (cases["checkpoint"] == checkpoint)
            & (cases["split"] == split)
            & (cases["seen"] == seen)
            & (cases["metric"] == self.options.metric)
            & cases["value"].notna()  # cases without a region, for every model
        ].astype({"patient": str, "case": str})
        found: dict[Model, Sites] = {}
        for (method, view, site), own in rows.groupby(["method", "view", "site"], observed=True, sort=True):
            table = own.pivot(index="seed", columns=["patient", "case"], values="value")
            found.setdefault(Model(str(method), str(view)), {})[str(site)] = table
        return {model: _same_seeds(sites) for model, sites in found.items()}

    @cached_property
    def _all_test(self) -> dict[Model, Sites]:
        return self.scores(self.options.checkpoint, "test", seen=self.seen)

    @cached_property
    def twins(self) -> dict[Model, Model]:
        """Model -> the first model of its view with the same scores, such as Ditto's global model and FedAvg's.

        One model under several names would tie with itself in ranks and be tested several times; it takes part once.
        Models with more seeds come first, then the reference. All metrics of both checkpoints must agree, on the seeds
        that both have: one metric alone may be the same for different models.
        """
        seeds = {model: self.seeds(model) for model in self._all_test}
        firsts: dict[Model, Model] = {}
        for model in sorted(seeds, key=lambda m: (-len(seeds[m]), self.name(m) != REFERENCE, m)):
            others = (first for first in dict.fromkeys(firsts.values()) if first.view == model.view)
            firsts[model] = next((o for o in others if self._same_scores(model, o)), model)
        return firsts

    def _same_scores(self, a: Model, b: Model) -> bool:
        mine, theirs = self._everything[a], self._everything[b]
        seeds = mine.index.intersection(theirs.index)
        if not len(seeds):
            return False
        mine, theirs = (table.loc[seeds].dropna(axis=1, how="all") for table in (mine, theirs))
        return mine.columns.equals(theirs.columns) and np.allclose(
            mine.to_numpy(), theirs.to_numpy(), rtol=0, atol=10.0**-DECIMALS, equal_nan=True
        )

    @cached_property
    def _everything(self) -> dict[Model, pd.DataFrame]:
        """Every model's test scores: seeds x (checkpoint, metric, site, case)."""
        cases = self.gathered.cases
        rows = cases[(cases["split"] == "test") & (cases["seen"] == self.seen)]
        keys = ["checkpoint", "metric", "site", "case"]
        return {
            Model(str(method), str(view)): own.astype(dict.fromkeys(keys, "str")).pivot(
                index="seed", columns=keys, values="value"
            )
            for (method, view), own in rows.groupby(["method", "view"], observed=True)
        }

    def seeds(self, model: Model) -> frozenset[int]:
        """Seeds that tested a model."""
        return frozenset(int(seed) for values in self._all_test[model].values() for seed in values.index)

    @cached_property
    def test(self) -> dict[Model, Sites]:
        """Test scores of the chosen checkpoint; of models that are the same, the first."""
        return {model: sites for model, sites in self._all_test.items() if self.twins[model] == model}

    @cached_property
    def patients(self) -> dict[Model, Sites]:
        """The same side by side (`side_by_side`), with every patient's cases averaged: seeds x patients."""
        return {
            model: {site: of_patients(v) for site, v in self.side_by_side(model, sites).items()}
            for model, sites in self.test.items()
        }

    @cached_property
    def validation_scores(self) -> dict[Model, Sites]:
        """Validation scores of the checkpoint, seeds x patients; of complete models on the ranked seeds."""
        found = {}
        for model, sites in self.scores(self.options.checkpoint, "val", seen=True).items():
            shared = self.ranked_seeds if model in self.complete else None
            tables = {site: of_patients(v) for site, v in sites.items()}
            found[model] = tables if shared is None else {site: v.reindex(shared) for site, v in tables.items()}
        return found

    @cached_property
    def validation(self) -> dict[Model, dict[str, float]]:
        """Mean validation scores of the checkpoint: model -> site -> mean."""
        return {
            model: {site: site_mean(v.to_numpy()) for site, v in sites.items()}
            for model, sites in self.validation_scores.items()
        }

    def worth(self, model: Model) -> float:
        """Mean validation score over all sites; more is better, -inf where there is none."""
        known = [value for value in self.validation.get(model, {}).values() if np.isfinite(value)]
        return self.options.sign * float(np.mean(known)) if known else -np.inf

    @cached_property
    def models(self) -> list[Model]:
        """All models, the best mean first; behind them those that lack seeds or sites that others have."""

        def order(model: Model) -> tuple[bool, float, Model]:
            mean = self.options.sign * float(np.mean(list(self.means(model).values())))
            return model not in self.complete, -mean if np.isfinite(mean) else np.inf, model

        return sorted(self.test, key=order)

    @cached_property
    def ranked_seeds(self) -> list[int]:
        """The seeds on which models stand side by side: those that give the most models times seeds."""
        own = [self.seeds(model) for model in self.test]
        if not own:
            return []
        chosen = max(
            sorted(own, key=sorted), key=lambda seeds: (len(seeds) * sum(map(seeds.issubset, own)), -len(seeds))
        )
        return sorted(chosen)

    @cached_property
    def seeds_of_means(self) -> dict[Model, list[int]]:
        """Of each model the seeds that its means are over: the ranked ones where it has them, else its own."""
        ranked = self.ranked_seeds
        own = {model: self.seeds(model) for model in self._all_test}
        return {model: ranked if seeds.issuperset(ranked) else sorted(seeds) for model, seeds in own.items()}

    def side_by_side(self, model: Model, sites: Sites) -> Sites:
        """A model's scores on the seeds of its means, without cases and sites that these did not test."""
        seeds = self.seeds_of_means[model]
        tables = {site: values[values.index.isin(seeds)].dropna(axis=1, how="all") for site, values in sites.items()}
        return {site: values for site, values in tables.items() if values.size}

    @cached_property
    def complete(self) -> frozenset[Model]:
        """Models with a score at every site from each of these seeds: only their means and ranks stand side by side."""
        return frozenset(
            model
            for model in self.test
            if self.patients[model].keys() == set(self.sites)
            and self.seeds(model).issuperset(self.ranked_seeds)
            and all(np.isfinite(mean) for mean in self.means(model).values())
        )

    @cached_property
    def sites(self) -> list[str]:
        """Their names."""
        return sorted({site for sites in self.test.values() for site in sites})

    def means(self, model: Model) -> dict[str, float]:
        """Test mean of a model at each site, on the seeds of its means."""
        return {site: site_mean(values.to_numpy()) for site, values in self.patients[model].items()}

    def name(self, model: Model) -> str:
        """Of the algorithm."""
        return self.gathered.methods[model.method].name

    @cached_property
    def tuned(self) -> list[Tuned]:
        """Methods that `sweep.py tune` tuned and that are here as they come, too; the best first.

        Both have the same seeds, sites and kind of model.
        """
        methods = self.gathered.methods
        told = [found for label in methods if (found := TUNED.fullmatch(label)) and found[1] in methods]
        pairs = [(found, self._answering_of(found[1]), self._answering_of(found[0])) for found in told]
        alike = [
            Tuned(methods[found[1]], methods[found[0]], plain, tuned)
            for found, plain, tuned in pairs
            if plain and tuned and {plain, tuned} <= self.complete and plain.view == tuned.view
        ]
        return sorted(alike, key=lambda pair: self.models.index(pair.after))

    def _answering_of(self, method: str) -> Model | None:
        """A method's personal model, or its global one where sites have none of their own."""
        known = (self.twins.get(Model(method, view)) for view in (PERSONAL, GLOBAL))
        return next((model for model in known if model is not None), None)

    def is_baseline(self, model: Model) -> bool:
        """Local and pooled training are baselines, not candidates."""
        return self.name(model) in BASELINES

    @cached_property
    def overview(self) -> pd.DataFrame:
        """Every model, site and checkpoint: columns of `_overview_rows`; seen sites and, apart, unseen ones."""
        rows = chain.from_iterable(
            self._overview_rows(model, sites, checkpoint, seen)
            for seen in (True, False)
            for checkpoint in CHECKPOINTS
            for model, sites in self.scores(checkpoint, "test", seen=seen).items()
            if model in (self if seen else self.unseen).test
        )
        return pd.DataFrame(rows)

    def _overview_rows(self, model: Model, sites: Sites, checkpoint: str, seen: bool) -> Iterable[dict[str, Any]]:
        sites = (self if seen else self.unseen).side_by_side(model, sites)
        if not sites:
            return
        found = self.resample(sites)
        common = {"method": model.method, "view": model.view, "checkpoint": checkpoint, "seen": seen}
        per_seed = np.stack([seed_means(of_patients(values).to_numpy()) for values in sites.values()])
        parts = [(OVERALL, found.overall, np.nanmean(per_seed, axis=0), list(sites.values()))]
        parts += [(site, found.sites[site], per_seed[i], [values]) for i, (site, values) in enumerate(sites.items())]
        for site, interval, by_seed, tables in parts:
            spread = float(np.nanstd(by_seed, ddof=1)) if np.isfinite(by_seed).sum() > 1 else float("nan")
            row = {"site": site, **interval._asdict(), "seed_spread": spread, **counted(tables)}
            told = no_interval(interval.low, row["patients"])
            yield {**common, **row, "seeds": int(np.isfinite(by_seed).sum()), "no_interval": told}

    def resample(self, sites: Mapping[str, pd.DataFrame]) -> Bootstrap:
        """Means with intervals."""
        arrays = {site: values.to_numpy() for site, values in sites.items()}
        whose = {site: patient_numbers(values) for site, values in sites.items()}
        return bootstrap(arrays, draws=self.options.draws, confidence=self.options.confidence, patients=whose)

    # --- pairs --------------------------------------------------------------------------------------------------------

    def gain(self, model: Model, other: Model, site: str) -> pd.DataFrame | None:
        """By how much a model is better than another, seeds x (patient, case), on seeds and cases that both have.

        None where they share none. Positive is better, whichever way the metric points.
        """
        mine, theirs = self.test.get(model, {}).get(site), self.test.get(other, {}).get(site)
        if mine is None or theirs is None:
            return None
        seeds, cases = mine.index.intersection(theirs.index), mine.columns.intersection(theirs.columns)
        apart = (mine.loc[seeds, cases] - theirs.loc[seeds, cases]) * self.options.sign
        apart = apart.dropna(axis=1, how="all").dropna(axis=0, how="all")
        return apart if apart.size else None

    def peer(self, model: Model, algorithm: str, view: str) -> Model | None:
        """The model of another algorithm that was trained under the most similar settings; None if there is none."""
        methods = self.gathered.methods
        found = [m for m in self.test if m.view == view and methods[m.method].name == algorithm]
        own = methods[model.method]
        shared = [m for m in found if set(methods[m.method].seeds) & set(own.seeds)]
        return min(shared, key=lambda m: (own.distance(methods[m.method]), m), default=None)

    def counterpart(self, model: Model) -> Model | None:
        """What a personal model is held against: its method's own global model, else FedAvg's."""
        own = self.twins.get(Model(model.method, GLOBAL))
        return own if own is not None else self.peer(model, REFERENCE, GLOBAL)

    @cached_property
    def tests(self) -> pd.DataFrame:
        """All questions at all sites and over them, one family for Holm's correction.

        Each personal model against its global one, each model against local training; of sites that took no part, each
        model against FedAvg, and against FedAvg with the site's own normalisation statistics. Columns: question, those
        of `compare`, p_holm.
        """
        if self.seen:
            asked = [(m, self.counterpart(m), AGAINST_GLOBAL) for m in self.models if self._personalised(m)]
            asked += [(m, self.peer(m, LOCAL, PERSONAL), AGAINST_LOCAL) for m in self.models if not self.is_baseline(m)]
        else:
            asked = [(m, self.peer(m, REFERENCE, GLOBAL), AGAINST_REFERENCE) for m in self.models]
            asked += [(m, self.peer(m, REFERENCE, OWN_STATISTICS), AGAINST_OWN_STATISTICS) for m in self.models]
        rows = []
        for model, against, question in asked:
            if against in (None, model):
                continue
            found = (self.compare(model, against, site) for site in (OVERALL, *self.sites))
            rows += [{"question": question, **row} for row in found if row is not None]
        table = pd.DataFrame(rows)
        return table.assign(p_holm=holm(table["p"].to_list())) if rows else table

    @cached_property
    def hopeless(self) -> str:
        """What is said where no test of the family could be significant after Holm; else nothing."""
        size = len(self.tests)
        least = float(self.tests["smallest_p"].min()) * size if size else 0.0
        if least <= self.options.alpha:
            return ""
        return (
            f"No test of this family could be significant: none of {size} can be below {min(1.0, least):.3g} corrected."
        )

    def answers_to(self, question: str) -> pd.DataFrame:
        """The tests of one question; empty if none was asked."""
        return self.tests[self.tests["question"] == question] if len(self.tests) else self.tests

    def compare(self, model: Model, against: Model | None, site: str) -> dict[str, Any] | None:
        """One test at one site, or of the mean over sites (`OVERALL`); None where nothing is shared.

        The names of both models, site, seeds, patients, cases, the ends of the gain's interval (or why there is none)
        and the fields of `PairedTest`.
        """
        if against is None:
            return None
        if (model, against) not in self._compared:
            self._compared[model, against] = self._compare(model, against)
        return self._compared[model, against].get(site)

    @cached_property
    def _compared(self) -> dict[tuple[Model, Model], dict[str, dict[str, Any]]]:
        return {}

    def _compare(self, model: Model, against: Model) -> dict[str, dict[str, Any]]:
        gains = {site: gain for site in self.sites if (gain := self.gain(model, against, site)) is not None}
        if not gains:
            return {}
        gains = _same_seeds(gains)
        drawn = self.resample(gains)
        parts = {site: ({site: gain}, drawn.sites[site]) for site, gain in gains.items()}
        parts[OVERALL] = (gains, drawn.overall)
        rows = {}
        for site, (tables, interval) in parts.items():
            arrays = {name: of_patients(table).to_numpy() for name, table in tables.items()}
            test: PairedTest = paired(arrays)
            low, high = self._ends(interval, test)
            seeds = sum(
                any(np.isfinite(a[i]).any() for a in arrays.values()) for i in range(len(next(iter(arrays.values()))))
            )
            rows[site] = {
                "model": model.label, "against": against.label, "site": site, "seeds": seeds,
                **counted(list(tables.values())), **test.__dict__,
                "low": low, "high": high, "no_interval": no_interval(low, test.patients),
            }  # fmt: skip
        return rows

    def _ends(self, drawn: Interval, test: PairedTest) -> tuple[float, float]:
        """Of a gain's interval: the outer ones of the bootstrap's and of t, as far as gains can go."""
        low, high = test.interval(self.options.confidence)
        outer = np.fmin(drawn.low, low), np.fmax(drawn.high, high)
        low, high = (float(end) for end in np.clip(outer, -self.options.span, self.options.span))
        return low, high

    def _personalised(self, model: Model) -> bool:
        return model.view == PERSONAL and not self.is_baseline(model)

    # --- fairness -----------------------------------------------------------------------------------------------------

    @cached_property
    def fairness(self) -> pd.DataFrame:
        """How evenly each complete model serves sites; see `evaluation.statistics.Fairness`."""
        rows = []
        for model in self.ranked:
            arrays = {site: values.to_numpy() for site, values in self.patients[model].items()}
            found = fairness(arrays, higher_is_better=self.options.higher_is_better)
            rows.append({"method": model.method, "view": model.view, **found.__dict__})
        return pd.DataFrame(rows)

    # --- ranks --------------------------------------------------------------------------------------------------------

    @property
    def ranked(self) -> list[Model]:
        """Models that are ranked against each other, the best mean first."""
        return [model for model in self.models if model in self.complete]

    @cached_property
    def patient_table(self) -> pd.DataFrame:
        """(site, patient) x model: scores averaged over the ranked seeds; those that some model lacks are left out."""
        columns = {}
        for model in self.ranked:
            means = {site: v.mean() for site, v in self.patients[model].items()}
            columns[model.label] = pd.concat(means)
        return pd.DataFrame(columns).dropna()

    @cached_property
    def ranks(self) -> Ranking:
        """Of all models, over patients."""
        return ranking(
            self.patient_table.to_numpy(), alpha=self.options.alpha, higher_is_better=self.options.higher_is_better
        )

    @cached_property
    def block_means(self) -> pd.DataFrame:
        """(seed, site) x model: means over patients, where all models have one."""
        columns = {}
        for model in self.ranked:
            sites = {site: v.mean(axis=1) for site, v in self.patients[model].items()}
            columns[model.label] = pd.concat(sites).swaplevel()
        if not columns:
            return pd.DataFrame(index=pd.MultiIndex.from_tuples([], names=["seed", "site"]))
        return pd.DataFrame(columns).dropna().rename_axis(["seed", "site"]).sort_index()

    @cached_property
    def rank_table(self) -> pd.DataFrame:
        """(seed, site) x model: ranks, 1 is best."""
        means = self.block_means
        ranks = block_ranks(means.to_numpy(), higher_is_better=self.options.higher_is_better)
        return pd.DataFrame(ranks, index=means.index, columns=means.columns)

    @cached_property
    def stability(self) -> dict[str, float]:
        """Mean Kendall's tau between the rankings of two seeds, and of two sites."""
        means = self.block_means
        return {level: rank_stability(means.groupby(level).mean().to_numpy()) for level in ("seed", "site")}

    @cached_property
    def wins(self) -> pd.DataFrame:
        """On how many patients the model of the row beats that of the column."""
        table = self.patient_table
        counts = wins(table.to_numpy(), higher_is_better=self.options.higher_is_better)
        return pd.DataFrame(counts, index=table.columns, columns=table.columns)

    # --- heterogeneity ------------------------------------------------------------------------------------------------

    @cached_property
    def unseen(self) -> Analysis:
        """The same questions about sites that took no part."""
        return Analysis(self.gathered, self.options, seen=False)

    @cached_property
    def reference_runs(self) -> list[Run]:
        """Ordinary runs of one method: FedAvg, else one that noted its sites' updates."""
        ordinary = self.gathered.ordinary
        chosen = [m.label for m, _ in ordinary if m.name == REFERENCE] or [
            m.label for m, r in ordinary if len(r.folder.updates())
        ]
        label = chosen[0] if chosen else ordinary[0][0].label if ordinary else ""
        return [run for method, run in ordinary if method.label == label]

    @cached_property
    def update_distances(self) -> pd.DataFrame | None:
        """How far the sites' updates were apart (`evaluation.heterogeneity.update_differences`), mean over seeds."""
        noted = [update_differences(updates) for run in self.reference_runs if len(updates := run.folder.updates())]
        if not noted:
            return None
        means = pd.concat(noted).groupby(["site", "other", "measure"], sort=False)["value"].mean()
        return means.reset_index()

    @cached_property
    def answering(self) -> tuple[Model, dict[str, float]] | None:
        """The personal model with the best validation mean over sites, and its gain over its global one by site.

        One model for all sites: gains of different methods would not follow a site's own difference.
        """
        rows = self.answers_to(AGAINST_GLOBAL)
        asked = [m for m in self.models if len(rows) and m.label in set(rows["model"])]
        if not asked:
            return None
        best = max(asked, key=lambda model: (model in self.complete, self.worth(model)))
        own = rows[(rows["model"] == best.label) & (rows["site"] != OVERALL)]
        return best, {str(site): float(gain) for site, gain in zip(own["site"], own["gain"], strict=True)}

    # --- cost ---------------------------------------------------------------------------------------------------------

    @cached_property
    def curves(self) -> pd.DataFrame:
        """Validation Dice over rounds: method, view, seed, round, value, bytes (both ways, so far), seconds.

        Seconds are those so far on the simulated clock, NaN without one.
        """
        parts = []
        for method, run in self.gathered.ordinary:
            so_far = run.traffic.set_index("round")[["down", "up"]].sum(axis=1).sort_index().cumsum()
            spent = [
                float(so_far.loc[:round].iloc[-1]) if len(so_far.loc[:round]) else 0.0 for round in run.curve["round"]
            ]
            known = spent if method.name != POOLED else float("nan")  # what a pool sends to itself is no traffic
            seconds = self._seconds(method, run)
            parts.append(run.curve.assign(method=method.label, seed=run.seed, bytes=known, seconds=seconds))
        empty = pd.DataFrame(columns=["round", "view", "value", "method", "seed", "bytes", "seconds"])
        return pd.concat(parts, ignore_index=True) if parts else empty

    def _seconds(self, method: Method, run: Run) -> list[float]:
        """Simulated seconds until each round of a run's curve; NaN without a clock, and for data that was pooled."""
        clock = self.options.clock
        if clock is None or method.name == POOLED:
            return [float("nan")] * len(run.curve)
        so_far = clock.after(run.work, run.carried, str(run.settings.get("federation.order", TOGETHER)))
        return [float(so_far.loc[:round].iloc[-1]) if len(so_far.loc[:round]) else 0.0 for round in run.curve["round"]]

    @cached_property
    def target(self) -> tuple[float, str]:
        """Validation Dice that counts as reached, and where it comes from."""
        best = self.curves.groupby(["method", "view", "seed"])["value"].max().groupby(["method", "view"]).mean()
        if best.empty:
            return float("nan"), "no validation curve"
        reference = [key for key in best.index if self.gathered.methods[key[0]].name == REFERENCE and key[1] == GLOBAL]
        of = best[reference] if reference else best
        method, view = list(of.index)[int(of.to_numpy().argmax())]
        label = Model(str(method), str(view)).label
        return self.options.target * float(of.max()), f"{self.options.target:.0%} of the best of {label}"

    @cached_property
    def cost(self) -> pd.DataFrame:
        """Per model, mean over seeds: bytes, steps, seconds, memory, rounds until the target."""
        spent = pd.DataFrame([{"method": m.label, **run_cost(run)} for m, run in self._tested])
        if spent.empty:
            return spent
        per_method = spent.groupby("method").mean(numeric_only=True)
        rows = []
        for model in self.models:
            if model.method not in per_method.index:
                continue
            used = {str(name): value for name, value in per_method.loc[model.method].to_dict().items()}
            rows.append({**model._asdict(), **self._reached(model), **used})
        return pd.DataFrame(rows)

    @property
    def _tested(self) -> list[tuple[Method, Run]]:
        """The runs that test these sites; where sites were held out in turn, a run is all its folds."""
        every = [(self.gathered.methods[label], run) for label, runs in self.gathered.runs.items() for run in runs]
        return [(method, run) for method, run in every if (run.cases["seen"] == self.seen).any()]

    def _reached(self, model: Model) -> dict[str, Any]:
        """When a model's validation score first passes the target: mean over the seeds that reach it."""
        own = self.curves[(self.curves["method"] == model.method) & (self.curves["view"] == model.view)]
        first = own[own["value"] >= self.target[0]].groupby("seed")[["round", "bytes", "seconds"]].min()
        seeds = own["seed"].nunique()
        return {
            "rounds_to_target": float(first["round"].mean()),
            "bytes_to_target": float(first["bytes"].mean()),
            "seconds_to_target": float(first["seconds"].mean()),
            "reached": f"{len(first)} of {seeds}",
        }


def run_cost(run: Run) -> dict[str, float]:
    """What one run used; NaN for what its folder does not tell, and for the traffic of data that was pooled."""
    travelled = len(run.traffic) > 0 or run.settings["algorithm.name"] == LOCAL
    pooled = run.settings["algorithm.name"] == POOLED
    unknown = float("nan")
    return {
        "bytes_down": float(run.traffic["down"].sum()) if travelled and not pooled else unknown,
        "bytes_up": float(run.traffic["up"].sum()) if travelled and not pooled else unknown,
        "steps": float(run.rounds["steps"].sum()) if len(run.rounds) else unknown,
        "training_seconds": float(run.rounds["seconds"].sum(skipna=False)) if len(run.rounds) else unknown,
        **run.cost,
    }


def patient_numbers(table: pd.DataFrame) -> NDArray[np.int64]:
    """The patient of each case of a table, numbered from 0."""
    numbers: NDArray[np.int64] = table.columns.get_level_values("patient").factorize()[0].astype(np.int64)
    return numbers


def of_patients(table: pd.DataFrame) -> pd.DataFrame:
    """Seeds x (patient, case) -> seeds x patients: the mean over a patient's cases."""
    names = table.columns.get_level_values("patient").unique()
    return pd.DataFrame(by_patient(table.to_numpy(), patient_numbers(table)), index=table.index, columns=names)


def counted(tables: Iterable[pd.DataFrame]) -> dict[str, int]:
    """How many patients and cases some tables hold together."""
    held = list(tables)
    patients = sum(len(table.columns.get_level_values("patient").unique()) for table in held)
    return {"patients": patients, "cases": sum(table.shape[1] for table in held)}


def no_interval(end: float, patients: int) -> str:
    """What stands in an interval's place where patients are too few for one; else nothing."""
    return "" if np.isfinite(end) else f"no interval: {count(patients, 'patient')}"


def _same_seeds(sites: Sites) -> Sites:
    seeds = sorted({seed for values in sites.values() for seed in values.index})
    return {site: values.reindex(seeds) for site, values in sites.items()}
