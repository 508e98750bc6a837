"""`Drawing`: a matplotlib figure without pyplot."""

from io import BytesIO

from matplotlib.figure import Figure


class Drawing(Figure):
    """A matplotlib figure that a notebook shows although pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        with BytesIO() as file:
            self.savefig(file, format="png", dpi=100)
            return file.getvalue()
