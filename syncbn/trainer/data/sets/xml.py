"""An XML file as elements that know their line, which a message can name."""

from pathlib import Path
from xml.parsers import expat

from syncbn.trainer.errors import UserError


class Element:
    __slots__ = ("children", "line", "tag", "text")

    def __init__(self, tag: str, line: int):
        self.tag, self.line, self.text = tag, line, ""
        self.children: list[Element] = []

    def child(self, tag: str) -> "Element | None":
        """The first child of that name."""
        return next((child for child in self.children if child.tag == tag), None)

    def text_of(self, tag: str) -> str | None:
        child = self.child(tag)
        return None if child is None else child.text.strip()


def read_xml(path: Path) -> Element:
    """The root element. Raises UserError for a file that cannot be read or is no XML."""
    parser = expat.ParserCreate()
    parser.buffer_text = True
    above = Element("", 0)
    open_elements = [above]

    def start(tag: str, attributes: object) -> None:
        element = Element(tag, parser.CurrentLineNumber)
        open_elements[-1].children.append(element)
        open_elements.append(element)

    def end(tag: str) -> None:
        open_elements.pop()

    def text(characters: str) -> None:
        open_elements[-1].text += characters

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    try:
        parser.Parse(path.read_bytes(), True)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except expat.ExpatError as error:
        why = expat.ErrorString(error.code)
        raise UserError(f"{path}, line {error.lineno}, is no XML ({why}): write that annotation anew") from error
    return above.children[0]
