"""`graft doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.options import Device as DeviceOption

if TYPE_CHECKING:
    from graft.use.doctor import Device, Report


def doctor(
    device: DeviceOption = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Try what this machine can do: number formats, attention, updates, quantised weights, twenty steps of training.

    Paste what it prints into a report of a bug: it names no user and no secret. It opens no connection. Exit code 2
    means that the device cannot train.

    Examples:

    graft doctor

    graft doctor --device cuda:1 --json
    """
    import json as json_module
    import os

    before = dict(os.environ)  # torch and graft add to it

    from graft.console import err, out
    from graft.use.doctor import examine

    with err.status("loading torch") as status:
        report = examine(device, before, status.update)
    if json:
        out.print(json_module.dumps(report.as_json(), indent=1, ensure_ascii=False), markup=False)
    else:
        _show(report)
    if not report.well:
        raise typer.Exit(2)


def _show(report: Report) -> None:
    from graft.console import facts, mark

    facts("versions", [[name, found] for name, found in report.versions.items() if found is not None])
    system = report.system
    shared = system["shared_memory_bytes"]
    facts(
        "machine",
        [
            ["system", system["platform"]],
            ["cores", f"{system['cores_usable']} of {system['cores']} usable; torch uses {system['threads']}"],
            ["instructions", system["cpu_kernels"]],
            ["memory", f"{_gib(system['memory_free_bytes'])} free of {_gib(system['memory_bytes'])}"],
            ["shared memory", "none" if shared is None else _gib(shared)],
            ["disk for runs", f"{_gib(system['disk_free_bytes'])} free"],
        ],
    )
    facts("extras (pip install 'graft-llm[NAME]')", report.extras.items())
    if report.environment:
        facts("environment", report.environment.items())
    for device in report.devices:
        _show_device(device)
    for hint in report.hints:
        mark(None, hint)
    for problem in report.problems:
        mark(False, problem)
    if report.well:
        names = " and ".join(device.name for device in report.devices if device.trains)
        mark(True, f"all is well: {names} can train")


def _show_device(device: Device) -> None:
    from graft.console import checks

    about = f"{device.maker}, {_gib(device.free)} free of {_gib(device.memory)}"
    if device.capability:
        about += f", compute capability {device.capability}"
    speeds = ", ".join(f"{name} {_flops(speed)}" for name, speed in device.products.items())
    rows = []
    for finding in device.findings:
        tried = finding.tried
        said = tried.why if not tried.works else _error(tried.error)
        rows.append((tried.works if tried.works or finding.needed else None, finding.what, said))
    checks(f"{device.name}: {about}", rows, f"precision auto is {device.precision}; products: {speeds or 'none'}")


def _error(error: float | None) -> str:
    return "" if error is None else f"error {error:.1e}" if error else "error 0"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def _flops(speed: float) -> str:
    return f"{speed / 1e12:,.1f} TFLOP/s" if speed >= 1e12 else f"{speed / 1e9:,.0f} GFLOP/s"
