// Figures as people read them. What is not known is a dash.

const NONE = "–";

export function count(value) {
  return isKnown(value) ? Math.round(value).toLocaleString("en") : NONE;
}

/** Three significant digits: 0.123, 1.23, 12.3, 1,234. */
export function figure(value) {
  if (!isKnown(value)) return NONE;
  if (value === 0) return "0";
  if (Math.abs(value) >= 100) return count(value);
  return value.toFixed(Math.abs(value) >= 10 ? 1 : 2);
}

/** Decimal units, as disks and networks are sold. */
export function bytes(value) {
  if (!isKnown(value)) return NONE;
  const units = ["B", "KB", "MB", "GB", "TB", "PB"];
  let rest = value;
  let unit = 0;
  while (rest >= 999.5 && unit < units.length - 1) {
    rest /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? count(rest) : rest >= 100 ? rest.toFixed(0) : rest.toFixed(1)} ${units[unit]}`;
}

export function gigabytesPerSecond(value) {
  if (!isKnown(value)) return NONE;
  const rate = value / 1e9;
  return `${rate >= 0.1 || rate === 0 ? rate.toFixed(2) : rate.toFixed(3)} GB/s`;
}

export function percent(ratio) {
  return isKnown(ratio) ? `${Math.round(100 * ratio)} %` : NONE;
}

export function seconds(value) {
  if (!isKnown(value)) return NONE;
  if (value < 0.0995) return `${(1000 * value).toFixed(value < 0.00995 ? 1 : 0)} ms`;
  if (value < 9.95) return `${value.toFixed(2)} s`;
  if (value < 120) return `${value.toFixed(0)} s`;
  return age(value);
}

/** Hours and minutes, or days and hours. */
export function age(value) {
  if (!isKnown(value)) return NONE;
  const minutes = Math.floor(value / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

function isKnown(value) {
  return typeof value === "number" && Number.isFinite(value);
}
