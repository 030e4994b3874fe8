// One dashboard as Grafana shows it, of the Prometheus at this origin: ?dashboard=NAME&from=MS&to=MS&interval=5s
import { flushSync } from 'react-dom';
import { createRoot } from 'react-dom/client';
import type { ReactNode } from 'react';
import type { DataFrame, Field, FieldConfig, TimeRange } from '@grafana/data';
// Not imported: their ES modules import what other modules of theirs do not export, which only CommonJS puts up with.
import data = require('@grafana/data');
import schema = require('@grafana/schema');
import ui = require('@grafana/ui');

type Target = { expr: string; legendFormat: string };
type Place = { x: number; y: number; w: number; h: number };
type Panel = {
  id: number; type: 'timeseries' | 'stat'; title: string; description: string; gridPos: Place; targets: Target[];
  fieldConfig: { defaults: FieldConfig; overrides: [] };
};
type Dashboard = { title: string; panels: Panel[] };
type Series = { metric: Record<string, string>; values: Array<[number, string]> };
type Size = { width: number; height: number };

// Grafana's grid, in pixels: 24 columns, and rows of a fixed height.
const WIDTH = 1600, COLUMNS = 24, ROW = 30, GAP = 8;
// What Grafana takes where a panel does not say.
const LINE = {
  drawStyle: schema.GraphDrawStyle.Line, lineInterpolation: schema.LineInterpolation.Linear, lineWidth: 1,
  fillOpacity: 0, showPoints: schema.VisibilityMode.Auto, pointSize: 5, axisPlacement: schema.AxisPlacement.Auto,
};
const COLOURS = { timeseries: data.FieldColorModeId.PaletteClassic, stat: data.FieldColorModeId.Thresholds };
const LEGEND: schema.VizLegendOptions = {
  showLegend: true, displayMode: schema.LegendDisplayMode.List, placement: 'bottom', calcs: [],
};

const theme = data.createTheme({ colors: { mode: 'dark' } });
const asked = new URLSearchParams(location.search);
const [from, to] = ['from', 'to'].map((end) => data.dateTime(Number(asked.get(end))));
const range: TimeRange = { from, to, raw: { from, to } };

/** The series of one target: as many points as the panel is wide, but not closer than Prometheus scrapes. */
async function answer({ expr, legendFormat }: Target, panel: Panel): Promise<DataFrame[]> {
  const least = asked.get('interval')!, leastMs = data.rangeUtil.intervalToMs(least);
  const { intervalMs } = data.rangeUtil.calculateInterval(range, Math.round(box(panel.gridPos).width), least);
  const rate = `${Math.max(intervalMs + leastMs, 4 * leastMs)}ms`, shown = `${to.diff(from)}ms`;
  const query = expr.replaceAll('$__rate_interval', rate).replaceAll('$__range', shown);
  const step = intervalMs / 1000, [start, end] = [from, to].map((time) => Math.floor(time.unix() / step) * step);
  const body = new URLSearchParams({ query, start: `${start}`, end: `${end}`, step: `${step}` });
  const said = await (await fetch('/api/v1/query_range', { method: 'POST', body })).json();
  if (said.status !== 'success') throw new Error(`${panel.title}: ${said.error}`);
  return said.data.result.map((series: Series) => frame(series, legendFormat, panel, intervalMs));
}

function frame({ metric, values }: Series, legend: string, panel: Panel, interval: number): DataFrame {
  const { defaults } = panel.fieldConfig;
  const config = {
    color: { mode: COLOURS[panel.type] }, ...defaults, custom: { ...LINE, ...defaults.custom },
    displayNameFromDS: data.renderLegendFormat(legend, metric),
  };
  const numbers = values.map(([, value]) => Number(value)).map((value) => (Number.isFinite(value) ? value : null));
  const times = values.map(([seconds]) => seconds * 1000);
  return data.toDataFrame({ fields: [
    { name: 'Time', type: data.FieldType.time, values: times, config: { interval } },
    { name: 'Value', type: data.FieldType.number, values: numbers, labels: metric, config },
  ] });
}

/** Each series gets the next colour of the palette. */
function displayed(frames: DataFrame[]): DataFrame[] {
  frames.forEach(({ fields }, seriesIndex) => fields.forEach((field: Field) => {
    field.state = { seriesIndex, range: data.getMinMaxAndDelta(field) };
    field.display = data.getDisplayProcessor({ field, theme, timeZone: 'utc' });
  }));
  return frames;
}

function Graph({ frames, ...size }: { frames: DataFrame[] } & Size) {
  return <ui.TimeSeries frames={frames} timeRange={range} timeZone="utc" legend={LEGEND} {...size} />;
}

function Stat({ panel, frames, ...size }: { panel: Panel; frames: DataFrame[] } & Size) {
  const [{ display, sparkline }] = data.getFieldDisplayValues({
    data: frames, theme, sparkline: true, timeZone: 'utc', fieldConfig: panel.fieldConfig,
    reduceOptions: { calcs: [data.ReducerID.lastNotNull] }, replaceVariables: (text) => text,
  });
  return (
    <ui.BigValue value={{ ...display, title: undefined }} sparkline={sparkline} theme={theme} {...size}
      colorMode={ui.BigValueColorMode.Value} graphMode={ui.BigValueGraphMode.Area} />
  );
}

function Nothing({ height }: Size) {
  const color = theme.colors.text.secondary;
  return <div style={{ height, display: 'grid', placeItems: 'center', color }}>No data</div>;
}

function box({ x, y, w, h }: Place) {
  const column = (WIDTH - GAP) / COLUMNS;
  return { left: GAP + x * column, top: y * (ROW + GAP), width: w * column - GAP, height: h * (ROW + GAP) - GAP };
}

function Placed({ panel, frames }: { panel: Panel; frames: DataFrame[] }) {
  const { width, height, ...corner } = box(panel.gridPos);
  return (
    <div style={{ position: 'absolute', ...corner }}>
      <ui.PanelChrome title={panel.title} description={panel.description} width={width} height={height}>
        {(w, h) => {
          if (!frames.length) return <Nothing width={w} height={h} />;
          if (panel.type === 'stat') return <Stat panel={panel} frames={frames} width={w} height={h} />;
          return <Graph frames={frames} width={w} height={h} />;
        }}
      </ui.PanelChrome>
    </div>
  );
}

function Shown({ dashboard, answers }: { dashboard: Dashboard; answers: DataFrame[][] }) {
  const bottom = Math.max(...dashboard.panels.map(({ gridPos }) => gridPos.y + gridPos.h));
  return (
    <ui.PanelContextProvider value={{ eventsScope: 'global', eventBus: new data.EventBusSrv() }}>
      <h3 style={{ margin: 0, padding: '14px 8px 12px' }}>{dashboard.title}</h3>
      <div style={{ position: 'relative', height: bottom * (ROW + GAP) }}>
        {dashboard.panels.map((panel, i) => <Placed key={panel.id} panel={panel} frames={answers[i]} />)}
      </div>
    </ui.PanelContextProvider>
  );
}

function Themed({ children }: { children?: ReactNode }) {
  return <data.ThemeContext.Provider value={theme}><ui.GlobalStyles />{children}</data.ThemeContext.Provider>;
}

Object.assign(window, { __grafana_public_path__: '/pictures/' }); // where the icons and letters are
const dashboard: Dashboard = await (await fetch(`${asked.get('dashboard')}.json`)).json();
const answers = await Promise.all(dashboard.panels.map(async (panel) =>
  displayed((await Promise.all(panel.targets.map((target) => answer(target, panel)))).flat())));
const element = document.getElementById('dashboard')!, root = createRoot(element);
flushSync(() => root.render(<Themed />));
await document.fonts.load('12px Inter'); // a canvas does not wait for its letters
root.render(<Themed><Shown dashboard={dashboard} answers={answers} /></Themed>);
element.dataset.empty = dashboard.panels.filter((_, i) => !answers[i].length).map(({ title }) => title).join(', ');
