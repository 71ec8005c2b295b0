"""Reads a page back: balance of its tags, its ids, its tables, and what it would fetch."""

from html.parser import HTMLParser

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """``problems`` are tags that do not close, ``tables`` lists of rows of (text, exact value or None) by caption or summary."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.problems, self.ids, self.targets, self.labels = [], [], [], [], []
        self.tags, self.charts, self.tables, self.headings, self.fetched = [], [], {}, [], []
        self.text, self.title, self.row, self.cell = [], "", None, None
        self.feed(text)
        self.close()
        self.problems += [f"{tag} stays open" for tag in self.open]

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self._note(tag, found)
        if tag not in VOID:
            self.open.append(tag)
        self.text = [] if tag in ("caption", "summary", "h2", "title", "desc") else self.text
        if tag == "svg":
            self.charts.append(found)
        elif tag == "table":
            self.tables.setdefault(self.title, [])
        elif tag == "tr" and "tbody" in self.open:
            self.row = []
        elif tag == "td":
            self.cell, self.text = None, []
        elif tag == "data" and self.row is not None:
            self.cell = float(found["value"])

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self._note(tag, dict(attributes))

    def _note(self, tag, found):
        self.ids += [found["id"]] if "id" in found else []
        self.labels += found.get("aria-labelledby", "").split()
        self.fetched += [(tag, name, found[name]) for name in ("src", "srcset", "action", "data", "poster") if name in found]
        for name in ("href", "xlink:href"):
            self.targets += [found[name]] if name in found else []
        self.problems += [f"{tag} has {name}" for name in found if name.startswith("on")]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"{tag} closes what is not open")
        said = "".join(self.text).strip()
        if tag in ("caption", "summary"):
            self.title = said
            if tag == "caption":
                self.tables[self.title] = []
        elif tag == "h2":
            self.headings.append(said)
            self.title = said
        elif tag in ("title", "desc") and "svg" in self.open:
            self.charts[-1][f"said-{tag}"] = said
        elif tag == "td":
            self.row.append((" ".join(said.split()), self.cell))
        elif tag == "tr" and self.row is not None:
            self.tables[self.title].append(self.row)
            self.row = None

    def handle_data(self, data):
        self.text.append(data)
