"""Groups of patients by columns of the manifest: `evaluation.groups=[sex,scanner]`."""

from __future__ import annotations

from fedseg.common.names import nearest
from fedseg.configs.compose import ConfigError
from fedseg.federation.contract import Row
from fedseg.launch.experiment import Experiment


def group_rows(experiment: Experiment) -> list[Row]:
    """Rows of groups.csv: site, case, column and its value; none where no groups are asked for.

    Args:
        experiment: its data are set up.

    Raises:
        ConfigError: the data come without a manifest, or it has no such column.
    """
    wanted = experiment.evaluation.groups
    told = experiment.data.columns() if wanted else {}
    known = sorted({name for cells in told.values() for name in cells})
    for column in wanted:
        if not known:
            raise ConfigError(
                f"evaluation.groups: these data come without a manifest; list their cases in a table with a column "
                f"{column!r} (data=folder, ROOT/sites.csv or data.manifest=FILE), or leave evaluation.groups=[]"
            )
        if column.lower() not in known:
            raise ConfigError(
                f"evaluation.groups: the manifest has no column {column!r}; {nearest(column.lower(), known)}. Its "
                f"columns are {', '.join(known)}: name one of these, or add the column"
            )
    return [
        {"site": site, "case": case, "column": column, "value": cells.get(column.lower(), "")}
        for column in wanted
        for (site, case), cells in told.items()
    ]
