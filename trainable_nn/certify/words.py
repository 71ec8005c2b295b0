"""A certificate in words that an engineer acts on."""

from __future__ import annotations

from .certificate import GRADES, Certificate, Hypothesis

MEANINGS = {
    "global": "gradient descent converges from these weights, whatever it does on the way",
    "ball": "gradient descent converges from these weights, because its path provably stays in a ball around them",
    "measured": "the numbers at these weights support training, and nothing is proved of the path",
    "none": "nothing supports that training reaches the minimum",
}
MOST_PATHS = 6  # named in one line; the rows name all
MANY_STEPS = 10_000_000
SLOW = (
    "That constant step is a proof and not a plan: certify_path proves a far longer one along its path, and "
    "optim.CertifiedDescent one for each iteration."
)
NOT_COVERED = "Plain gradient descent on all of these samples; mini-batches, momentum and weight decay are not covered."


def explain(certificate: Certificate) -> str:
    """The grade, its numbers, and, where a stronger grade was not given, what stands against it and what to do."""
    lines = [f"Grade {certificate.grade}: {MEANINGS[certificate.grade]}."]
    size = f"{certificate.samples} samples, {certificate.outputs} outputs, {certificate.parameters} trained parameters"
    lines.append(f"Loss {certificate.loss}{_at(certificate)}; {size}.")
    if certificate.lambda_lower > 0:
        lines.append(f"lambda_min(DF DF^T) >= {certificate.lambda_lower:.4g} (from the {certificate.lambda_source}).")
    lines += _descent(certificate)
    lines += [*certificate.notes]
    lines += _obstacles(certificate)
    if certificate.descent is not None:
        lines.append(NOT_COVERED)
    return "\n".join(lines)


def _at(certificate: Certificate) -> str:
    return "" if certificate.initial_loss is None else f" is {certificate.initial_loss:.6g} now"


def _descent(certificate: Certificate) -> list[str]:
    descent = certificate.descent
    if descent is None:
        return []
    path = (
        f"With a step of {certificate.step_size:.4g} the weights never move farther than {certificate.radius:.4g} (in norm), "
        f"where the loss's gradient has Lipschitz constant at most {certificate.smoothness_upper:.4g}."
    )
    lines = [path]
    if certificate.rate is not None:
        tenth = certificate.infimum + descent.excess / 10
        steps = certificate.steps_to(tenth)
        count = "" if steps is None else f" A tenth of the loss is reached within {steps} steps."
        lines.append(f"Each step multiplies the loss by at most 1 - {descent.gain:.4g}.{count}")
        if steps is None or steps > MANY_STEPS:
            lines.append(SLOW)
    else:
        steps = certificate.steps_to(certificate.goal)
        lines.append(
            f"Each step adds at least {descent.gain:.4g} to 1 / loss, proved down to a loss of {certificate.goal:.4g} "
            f"(within {steps if steps is not None else 'more than 1e18'} steps); below it a smaller step is proved: certify "
            f"again there."
        )
        if steps is None or steps > MANY_STEPS:
            lines.append(SLOW)
    return lines


def _obstacles(certificate: Certificate) -> list[str]:
    failing = certificate.failing
    if not failing:
        return []
    nearest = next(g for g in GRADES[GRADES.index(certificate.grade) + 1 :] if any(row.grade == g for row in failing))
    lines = [f"Why not {nearest!r}:" if nearest != GRADES[-1] else "Why not 'global':"]
    lines += _grouped([row for row in failing if row.grade == nearest])
    further = [row for row in failing if row.grade != nearest]
    if further:
        lines.append("And for the grades above it:")
        lines += _grouped(further)
    return lines


def _grouped(rows: list[Hypothesis]) -> list[str]:
    """One line a hypothesis and remedy, with the layers that share them."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        groups.setdefault((row.name, row.source, row.remedy), []).append(row.path)
    return [
        f"  - {_places(paths)}{name} [{source}]. {remedy}".rstrip() for (name, source, remedy), paths in groups.items()
    ]


def _places(paths: list[str]) -> str:
    paths = [path for path in paths if path]
    shown = ", ".join(paths[:MOST_PATHS])
    return f"{shown}{f' and {len(paths) - MOST_PATHS} more' if len(paths) > MOST_PATHS else ''}: " if paths else ""
