"""What an installation carries beside the package: the shipped blueprints, which lie beside it in a checkout.

Only setuptools reads this, when it builds (`tool.setuptools.cmdclass` in `pyproject.toml`); it needs nothing else.
"""

from __future__ import annotations

from pathlib import Path

from setuptools.command.build_py import build_py

FOLDER = "blueprints"


class WithBlueprints(build_py):
    """Copies `blueprints/` into the package. An editable installation leaves it where it is."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in self._blueprints():
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target), preserve_mode=False)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """What a build writes; the blueprints too."""
        return [*super().get_outputs(include_bytecode), *(str(target) for _, target in self._blueprints())]

    def get_source_files(self) -> list[str]:
        """What a source distribution must hold; the blueprints too."""
        return [*super().get_source_files(), *(str(source) for source, _ in self._blueprints())]

    def _blueprints(self) -> list[tuple[Path, Path]]:
        inside = Path(self.build_lib) / "chrysalis_ray"
        return [(path, inside / path) for path in sorted(Path(FOLDER).rglob("*")) if path.suffix in (".yaml", ".jinja")]
