"""The page's style sheet: one column on a phone, light and dark by the reader's setting, tables that stack."""

# Contrast with --card is at least 4.5 : 1 for text and 3 : 1 for lines, in both schemes.
CSS = """
:root { color-scheme: light dark; --page: #f4f5f7; --card: #ffffff; --ink: #1c2128; --soft: #57606a; --line: #c3cad2;
  --good: #1a7f37; --bad: #b3261e; --doubt: #7d5700; --accent: #0757a8;
  --series-1: #0072b2; --series-2: #c24e00; --series-3: #00805e; --series-4: #57606a; }
@media (prefers-color-scheme: dark) { :root { --page: #0e1116; --card: #171b22; --ink: #e6eaf0; --soft: #a3adb9;
  --line: #3b434e; --good: #57c878; --bad: #ff8a80; --doubt: #e8b84a; --accent: #7cb8ff;
  --series-1: #56b4e9; --series-2: #ff9f5a; --series-3: #35cfa0; --series-4: #a3adb9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", sans-serif; -webkit-text-size-adjust: 100%; overflow-wrap: anywhere; }
main { max-width: 68rem; margin: 0 auto; padding: 1rem; }
header { padding: .5rem .25rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .3rem 0; }
h2 { font-size: 1.25rem; line-height: 1.25; margin: 0 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .25rem; }
p { margin: .5rem 0; max-width: 46rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .75rem; padding: 1rem; margin: 1rem 0; }
.soft { color: var(--soft); }
.facts { display: grid; grid-template-columns: auto 1fr; gap: .1rem .9rem; margin: .75rem 0; font-size: .92rem; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; margin: .75rem 0; }
.tiles div { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .75rem; }
.tiles dt { color: var(--soft); font-size: .85rem; } .tiles dd { margin: 0; }
.tiles dd.soft { font-size: .85rem; line-height: 1.35; }
.tiles dd.value { white-space: nowrap; font-size: 1.35rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.good { color: var(--good); } .bad { color: var(--bad); } .doubt { color: var(--doubt); }
.verdict { font-size: 1.1rem; font-weight: 600; border-left: .3rem solid currentColor; padding: .3rem .75rem; }
.verdict span { color: var(--ink); }
.kind { display: inline-block; border: 1px solid var(--line); border-radius: 1rem; padding: 0 .6rem; font-size: .82rem;
  margin: 0 .3rem .25rem 0; }
.kind.proved { border-color: var(--good); } .kind.estimated { border-style: dashed; }
.absent { border: 1px dashed var(--doubt); border-radius: .5rem; padding: .5rem .75rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: .5rem 1.5rem; }
figure { margin: .75rem 0; min-width: 0; } figure > svg { display: block; width: 100%; max-width: 32rem; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; } svg text { fill: var(--ink); } figcaption { font-size: .88rem; color: var(--soft); }
details { margin: .75rem 0; } summary { cursor: pointer; color: var(--accent); padding: .35rem 0; }
table { border-collapse: collapse; width: 100%; margin: .75rem 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; }
th { text-align: left; color: var(--soft); font-weight: 600; vertical-align: bottom; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); } td { vertical-align: top; }
th, td { overflow-wrap: break-word; } td:not(:first-child) { min-width: 5.5rem; } .scroll { overflow-x: auto; }
td span, data { white-space: nowrap; }
pre { white-space: pre-wrap; font-size: .85rem; margin: .5rem 0; }
code { font-size: .88em; }
@media (max-width: 48rem) {
  body { font-size: 15px; } main { padding: .5rem; } section { padding: .8rem; margin: .7rem 0; }
  .facts { grid-template-columns: 1fr; gap: 0; } .facts dd { margin-bottom: .4rem; }
  .tiles { grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); }
  th, td { overflow-wrap: anywhere; padding: .3rem .35rem; } td:not(:first-child) { min-width: 0; }
  td span { white-space: normal; }
  table:not(.narrow), table:not(.narrow) :is(caption, tbody, tr, td) { display: block; width: 100%; }
  table:not(.narrow) thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table:not(.narrow) tr { border: 1px solid var(--line); border-radius: .5rem; padding: .4rem .6rem; margin: .5rem 0; }
  table:not(.narrow) td { display: grid; grid-template-columns: 7.5rem 1fr; gap: .5rem; border: 0; padding: .12rem 0;
    text-align: left !important; }
  table:not(.narrow) td::before { content: attr(data-label); color: var(--soft); }
  table:not(.narrow) td:empty { display: none; }
}
@media print { body { background: none; } section { break-inside: avoid-page; border: 0; padding: 0; } }
"""
