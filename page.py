"""
Web pages that are one file and ask nothing of any network: text, tables, pictures, and cards to filter.

    page('A study', [('Scores', ['In percent.', table(rows)]), ('Curves', [picture(png, 'png', 'training curves')])])

What is not Html is text and is escaped, in elements and in attributes; only the functions here make Html.
"""
import base64
import hashlib
from html import escape
from urllib.parse import quote

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1280px; margin: 0 auto; padding: 0 1rem 4rem }
table { border-collapse: collapse }
th, td { text-align: left; padding: .15rem .7rem .15rem 0; vertical-align: top; border-bottom: 1px solid #ddd }
.wide { overflow-x: auto; overflow-wrap: normal; font-variant-numeric: tabular-nums }
pre, h3, article { overflow-wrap: anywhere; white-space: pre-wrap }
img, select { max-width: 100% }
nav a, label { margin-right: 1rem }
form { position: sticky; top: 0; background: #fff; padding: .5rem 0; border-bottom: 1px solid #bbb }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 1rem }
article { border: 1px solid #bbb; border-radius: 4px; padding: .6rem; font-size: 14px }
article.right { border-top: 4px solid #0072B2 }
article.partly { border-top: 4px dotted #E69F00 }
article.wrong { border-top: 4px double #D55E00 }
article > svg { width: 100%; max-height: 320px }
article dl, .asked { max-height: 16rem; overflow: auto }
dl { display: grid; grid-template-columns: 4rem 1fr }
dd { margin: 0 }
.asked { font-weight: 600 }
.missing { background: #eee; border: 1px dashed #888; padding: 2rem .5rem }
"""
# the part of the address behind # holds what was picked, so that a selection can be linked to
SCRIPT = """
addEventListener('DOMContentLoaded', () => {
  const form = document.querySelector('form'), selects = [...form.querySelectorAll('select')];
  const cards = [...document.querySelectorAll('article')];
  function show() {
    const asked = new URLSearchParams(location.hash.slice(1));
    for (const select of selects) select.value = asked.get(select.name) ?? '';
    const picked = selects.filter(select => select.value);
    for (const card of cards) card.hidden = !picked.every(s => JSON.parse(card.dataset[s.name]).includes(s.value));
    for (const section of document.querySelectorAll('section section'))
      section.hidden = picked.length > 0 && !section.querySelector('article:not([hidden])');
    form.querySelector('output').value = `${cards.filter(card => !card.hidden).length} of ${cards.length}`;
    document.getElementById(location.hash.slice(1))?.scrollIntoView();
  }
  form.addEventListener('change', () => {
    location.hash = new URLSearchParams(selects.filter(s => s.value).map(s => [s.name, s.value])).toString() || 'all';
  });
  addEventListener('hashchange', show);
  show();
});
"""
# a second lock behind the escaping: no request, and no script but this one
POLICY = ("default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
          f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'")


class Html(str):
    """A piece of a page; any other str is text."""


def html(value):
    """Html as it is, anything else as escaped text; half a surrogate pair, which no file can hold, becomes '?'."""
    return value if isinstance(value, Html) else Html(escape(str(value).encode('utf-8', 'replace').decode()))


def tag(name, /, *inner, **attributes):
    """An element around Html and texts; the attributes class_ and data_x are written class and data-x."""
    given = ''.join(f' {key.rstrip("_").replace("_", "-")}="{html(str(value))}"' for key, value in attributes.items())
    return Html(f'<{name}{given}>{"".join(map(html, inner))}</{name}>')


def table(rows):
    """A table of rows of cells, the first one its head."""
    lines = [tag('tr', *(tag('td' if i else 'th', cell) for cell in row)) for i, row in enumerate(rows)]
    return tag('div', tag('table', *lines), class_='wide')


def link(text, path):
    """A link to a file, by its path from the page's own folder."""
    return tag('a', text, href=quote(path))


def fold(title, *inner):
    """What is seen when its title is clicked."""
    return tag('details', tag('summary', title), *inner)


def data_url(content, kind):
    """Bytes of an image of a kind ('png', 'webp') as an address."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def picture(content, kind, alt):
    """An image from its bytes, with a text for those who do not see it."""
    return Html(f'<img src="{data_url(content, kind)}" alt="{html(alt)}">')


def filters(choices):
    """
    A select box for each name -> list of values; a page has at most one such form. It shows those <article>s whose
    attribute data-NAME, a JSON list of str, holds the picked value, for every name, and the sections inside a section
    in which one is left.
    """
    boxes = [tag('label', f'{name} ', tag('select', tag('option', 'all', value=''),
                                          *(tag('option', value, value=value) for value in values), name=name))
             for name, values in choices.items()]
    return Html(tag('form', *boxes, tag('output')) + f'<script>{SCRIPT}</script>')


def page(title, sections):
    """
    A whole document as a str.
    sections  list of (heading, list of blocks); a block is Html, or a str that becomes a paragraph
    """
    parts = [tag('section', tag('h2', heading), *(b if isinstance(b, Html) else tag('p', b) for b in blocks),
                 id=f's{i}') for i, (heading, blocks) in enumerate(sections)]
    menu = tag('nav', *(tag('a', heading, href=f'#s{i}') for i, (heading, _) in enumerate(sections)))
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{html(POLICY)}">'
            f'{tag("title", title)}<style>{STYLE}</style></head>\n<body>{tag("h1", title)}{menu}\n'
            + '\n'.join(parts) + '</body></html>\n')
