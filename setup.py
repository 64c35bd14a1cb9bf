"""What pyproject.toml cannot say: the bundled images go into the wheel, and a package index cannot show our files."""
import re
from pathlib import Path
from shutil import copytree

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithImages(build_py):
    "Puts the images beside the module that reads them; an editable install reads them where they are."
    def run(self):
        super().run()
        if not self.editable_mode:
            copytree("data/openclipart", Path(self.build_lib, "llb/data/openclipart"), dirs_exist_ok=True)


def description():
    "The README without images and links into the repository."
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^]]*\]\((?!http)[^)]*\)\n*(\*[^*]+\*\n*)?", "", text)
    return re.sub(r"\[([^]]*)\]\((?!http)[^)]*\)", r"\1", text)


setup(cmdclass={"build_py": BuildWithImages}, long_description=description(),
      long_description_content_type="text/markdown")
