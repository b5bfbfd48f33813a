//! Text tables for people. Pure.

use crate::model::name::escape;

/// The text of an empty cell.
pub const EMPTY_CELL: &str = "-";

/// Formats aligned columns, without a newline at the end. Every cell is escaped; the last cell of a row is not padded.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [["shop".to_owned(), "3000".to_owned()], ["größe".to_owned(), String::new()]];
        assert_eq!(table(["NAME", "PORT"], &rows), "NAME   PORT\nshop   3000\ngröße");
    }

    #[test]
    fn a_cell_cannot_write_to_the_terminal() {
        let rows = [["a\u{1b}[2J\nb".to_owned()]];
        assert_eq!(table(["NAME"], &rows), "NAME\na\\u{1b}[2J\\nb");
    }
}
