//! Rows under a heading, for people. Pure.

use crate::name::escape;

/// What stands where there is nothing.
pub const NOTHING: &str = "-";

/// Lines of columns that stand below each other, without a newline at the end. Every cell is escaped; the last one of a
/// row is not padded, and may be missing.
pub fn table<const N: usize>(heading: [&str; N], rows: &[[String; N]]) -> String {
    let rows: Vec<[String; N]> =
        rows.iter().map(|row| row.each_ref().map(|cell| escape(cell).into_owned())).collect();
    let mut lines = vec![heading.map(str::to_owned)];
    lines.extend(rows);
    let mut widths = [0; N];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &[String; N]| {
        let padded = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    lines.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Bytes as people read them: three digits and a binary unit.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut tenths = u128::from(count) * 10 / 1024;
    let mut unit = 0;
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    let name = UNITS.get(unit).copied().unwrap_or_default();
    if tenths < 1_000 {
        format!("{}.{} {name}", tenths / 10, tenths % 10)
    } else {
        format!("{} {name}", tenths / 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_below_each_other() {
        let rows = [["shop".to_owned(), "3000".to_owned()], ["größe".to_owned(), String::new()]];
        assert_eq!(table(["NAME", "PORT"], &rows), "NAME   PORT\nshop   3000\ngröße");
    }

    #[test]
    fn a_cell_cannot_write_to_the_terminal() {
        let rows = [["a\u{1b}[2J\nb".to_owned()]];
        assert_eq!(table(["NAME"], &rows), "NAME\na\\u{1b}[2J\\nb");
    }

    #[test]
    fn bytes_have_three_digits_and_a_unit() {
        let all = [0, 1023, 1024, 1536, 102_400, 1_048_575, 1_048_576, 1 << 40, u64::MAX].map(bytes);
        let told =
            ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "100 KiB", "1023 KiB", "1.0 MiB", "1.0 TiB", "15.9 EiB"];
        assert_eq!(all, told);
    }
}
