"""The look of every page, light and dark, and the page around its content: no network."""

from html import escape

COLOURS = 8
"""Told apart by colour; a ninth line is dashed, and so on."""

STYLE = """
:root{color-scheme:light dark;--page:#f7f8fa;--card:#fff;--ink:#1f2937;--soft:#64748b;--rule:#e5e9f0;
--above:#1d4ed8;--below:#b45309;--c0:#2563eb;--c1:#d97706;--c2:#059669;--c3:#dc2626;--c4:#7c3aed;--c5:#0891b2;
--c6:#db2777;--c7:#65a30d}
@media (prefers-color-scheme:dark){:root{--page:#0f141b;--card:#171e27;--ink:#e5e9f0;--soft:#94a3b8;
--rule:#2a3441;--above:#93c5fd;--below:#fbbf24;--c0:#60a5fa;--c1:#fbbf24;--c2:#34d399;--c3:#f87171;--c4:#a78bfa;
--c5:#22d3ee;--c6:#f472b6;--c7:#a3e635}}
*{box-sizing:border-box} body{margin:0 auto;padding:28px 24px 60px;max-width:1240px;background:var(--page);
color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:26px;margin:0} h2{font-size:20px;margin:0 0 8px} h2 small{font-weight:400;font-size:14px} h3{
font-size:14px;font-weight:600;margin:22px 0 6px}
header p,.keys,figcaption,small,.note{color:var(--soft)} header p{max-width:80ch}
.note{font-size:13.5px;max-width:100ch;margin:6px 0}
section{background:var(--card);border:1px solid var(--rule);border-radius:12px;
padding:20px 24px;margin-top:18px;min-width:0}
.wide{overflow-x:auto} table{border-collapse:collapse;font-size:13.5px;width:100%}
th,td{text-align:left;padding:5px 6px;border-bottom:1px solid var(--rule);white-space:nowrap;
vertical-align:top;font-variant-numeric:tabular-nums} th:first-child{padding-left:0} th{font-weight:500}
tr:first-child th{color:var(--soft)} .quiet{color:var(--soft)} 
td small{font-size:12px;display:inline-block;min-width:13ch}
td b{display:inline-block;width:1em;text-align:center} .above{color:var(--above)} .below{color:var(--below)}
.tie{color:var(--soft);font-weight:400} svg{display:block;width:100%;height:auto}
svg text{font-size:11px;fill:var(--soft)} .grid{stroke:var(--rule)}
polyline,.keys line{fill:none;stroke-width:2;stroke-linejoin:round} .thin{stroke-width:1;opacity:.4}
.base{stroke:var(--soft);stroke-width:1.5;stroke-dasharray:3 3} 
.d1{stroke-dasharray:7 3} .d2{stroke-dasharray:2 3}
.area{stroke:none;opacity:.14} .a0{fill:var(--c0)} .a1{fill:var(--c1)} .a2{fill:var(--c2)}
.bar{fill:var(--c0);stroke:none} .b1{opacity:.25} .b2{opacity:.45} .b3{opacity:.65} .b4{opacity:.85}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;margin:0;font-size:13.5px} dd{margin:0;
color:var(--soft)}
.small{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:10px 18px;margin-top:14px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(480px,100%),1fr));gap:0 16px}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin-top:16px}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:12px 18px}
.tile b{display:block;font-size:20px} .tile span{color:var(--soft);font-size:13px}
figure{margin:0} figcaption{font-size:13px}
.keys{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0 0 6px;font-size:13px}
.keys svg{display:inline-block;width:24px;height:8px;margin-right:6px;vertical-align:middle}
.missing{color:var(--below)} details summary{cursor:pointer;color:var(--above)} pre{overflow-x:auto}
code,pre,.context,.response p{font:13.5px/1.75 ui-monospace,"DejaVu Sans Mono",Menlo,monospace}
td code{white-space:normal} .context{white-space:pre-wrap;width:60%}
.response{margin:16px 0 0} .response p{white-space:pre-wrap;overflow-wrap:anywhere;margin:4px 0}
.response .asked{color:var(--soft)} .response span{border-radius:2px} mark,.response span{color:inherit;
background:color-mix(in srgb,var(--c4) calc(var(--h,0)*55%),transparent)} mark{--h:.6;font-weight:600}
""" + "".join(f".c{i}{{stroke:var(--c{i})}} circle.c{i}{{fill:var(--c{i})}}\n" for i in range(COLOURS))


def render_html(name: str, kind: str, body: str) -> str:
    """A whole page called `name`; `kind` says what it is about, `body` is HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(name)} · {kind}</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )
