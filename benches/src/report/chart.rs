//! One SVG chart for each work.
//!
//! The rows are the contenders, the panels are the charted figures of the work. A bar shows the median, and a line with two
//! ends shows the least and the most. A relative figure is drawn as the ratio to `direct`, whose row is left out in favour
//! of a line at 1. The background is transparent, and every colour has a contrast of at least 4 to both white and the dark
//! grey of code hosts, so the same file is readable in both themes.
//!
//! Pure: plotters draws into a string.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::run::{Better, Figure, ReportError, Run, Work};
use super::summary::{DIRECT, Spread};
use super::table::short;

const WIDTH: u32 = 960;
const ROW_HEIGHT: i32 = 26;
const NAMES_WIDTH: i32 = 150;
const HEAD_HEIGHT: i32 = 44;
const FOOT_HEIGHT: i32 = 26;
/// Space at the right of each panel for the value of the longest bar.
const VALUE_WIDTH: i32 = 64;
const PANEL_GAP: i32 = 24;
/// In the unit of plotters, which divides by 1.24 for SVG: 13 pixels.
const TEXT_SIZE: i32 = 16;

const TEXT: RGBColor = RGBColor(118, 122, 128);
const OURS: RGBColor = RGBColor(31, 125, 226);
const PEER: RGBColor = RGBColor(118, 122, 128);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type DrawResult = Result<(), Box<dyn std::error::Error>>;

/// Draws the chart of `work`, or returns `None` where the work has no charted figure.
///
/// # Errors
/// When the plotting library fails.
pub fn chart(run: &Run, work: &Work) -> Result<Option<String>, ReportError> {
    let panels: Vec<Panel<'_>> = work
        .figures
        .iter()
        .filter(|figure| figure.charted)
        .map(|figure| Panel { run, work, figure })
        .collect();
    let mut names = run.contenders_in(work);
    names.retain(|name| panels.iter().any(|panel| panel.shows(name)));
    if panels.is_empty() || names.is_empty() {
        return Ok(None);
    }
    let mut svg = String::new();
    draw(&mut svg, run, &panels, &names)
        .map_err(|error| ReportError::Chart { work: work.name.clone(), reason: error.to_string() })?;
    Ok(Some(svg))
}

fn draw(svg: &mut String, run: &Run, panels: &[Panel<'_>], names: &[&str]) -> DrawResult {
    let rows = i32::try_from(names.len())?;
    let height = HEAD_HEIGHT + rows * ROW_HEIGHT + FOOT_HEIGHT;
    let area = SVGBackend::with_string(svg, (WIDTH, u32::try_from(height)?)).into_drawing_area();
    for (name, y) in names.iter().zip(row_centres()) {
        let colour = colour_of(run, name);
        area.draw(&Text::new((*name).to_owned(), (NAMES_WIDTH - 12, y), text(colour, HPos::Right)))?;
    }
    let count = i32::try_from(panels.len())?;
    let width = (i32::try_from(WIDTH)? - NAMES_WIDTH - PANEL_GAP * (count - 1)) / count;
    for (panel, left) in panels.iter().zip((NAMES_WIDTH..).step_by(usize::try_from(width + PANEL_GAP)?)) {
        panel.draw(&area, names, left, width - VALUE_WIDTH)?;
    }
    area.present()?;
    Ok(())
}

/// The vertical centres of the rows, from the first one on.
fn row_centres() -> impl Iterator<Item = i32> {
    (HEAD_HEIGHT + ROW_HEIGHT / 2..).step_by(ROW_HEIGHT.unsigned_abs() as usize)
}

fn colour_of(run: &Run, name: &str) -> RGBColor {
    let ours = run.conditions.contenders.iter().any(|each| each.name == name && each.ours);
    if ours { OURS } else { PEER }
}

fn text(colour: RGBColor, side: HPos) -> TextStyle<'static> {
    let font = ("sans-serif", TEXT_SIZE).into_font();
    TextStyle { font, color: colour.to_backend_color(), pos: Pos::new(side, VPos::Center) }
}

struct Panel<'a> {
    run: &'a Run,
    work: &'a Work,
    figure: &'a Figure,
}

impl Panel<'_> {
    fn draw(&self, area: &Area<'_>, names: &[&str], left: i32, width: i32) -> DrawResult {
        let spreads: Vec<Option<Spread>> = names.iter().map(|name| self.spread(name)).collect();
        let most = spreads.iter().flatten().map(|spread| spread.most).fold(self.least_scale(), f64::max);
        let scale = Scale { left, width, most };
        area.draw(&Text::new(self.heading(), (left, HEAD_HEIGHT / 2 - 4), text(TEXT, HPos::Left)))?;
        let bottom = HEAD_HEIGHT + ROW_HEIGHT * i32::try_from(names.len())?;
        line(area, [(left, HEAD_HEIGHT), (left, bottom)], TEXT.mix(0.6))?;
        if self.figure.relative {
            let x = scale.x(1.0);
            line(area, [(x, HEAD_HEIGHT), (x, bottom)], TEXT.mix(0.6))?;
            area.draw(&Text::new("direct", (x, bottom + FOOT_HEIGHT / 2), text(TEXT, HPos::Center)))?;
        }
        for ((name, spread), y) in names.iter().zip(&spreads).zip(row_centres()) {
            match spread {
                Some(_) if self.is_reference(name) => {}
                Some(spread) => bar(area, &scale, y, *spread, colour_of(self.run, name))?,
                None if self.run.invalid(self.work, name).is_some() => {
                    area.draw(&Text::new("invalid", (left + 6, y), text(TEXT, HPos::Left)))?;
                }
                None => {}
            }
        }
        Ok(())
    }

    /// Whether `name` is the line at 1 instead of a bar.
    fn is_reference(&self, name: &str) -> bool {
        self.figure.relative && name == DIRECT
    }

    /// Whether the row of `name` has something to show in this panel.
    fn shows(&self, name: &str) -> bool {
        let measured = self.spread(name).is_some() || self.run.invalid(self.work, name).is_some();
        measured && !self.is_reference(name)
    }

    /// The smallest value at the right end of the axis.
    fn least_scale(&self) -> f64 {
        if self.figure.relative { 1.0 } else { f64::MIN_POSITIVE }
    }

    fn spread(&self, name: &str) -> Option<Spread> {
        if self.figure.relative {
            self.run.ratios(self.work, name, &self.figure.key)
        } else {
            self.run.values(self.work, name, &self.figure.key)
        }
    }

    fn heading(&self) -> String {
        let unit = if self.figure.relative { ", × direct" } else { "" };
        let better = match self.figure.better {
            Better::More => "more is better",
            Better::Less => "less is better",
        };
        format!("{}{unit} ({better})", self.figure.label)
    }
}

/// Maps values to pixels; zero is at the left end.
struct Scale {
    left: i32,
    width: i32,
    most: f64,
}

impl Scale {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the fraction is between 0 and 1, the product is a pixel"
    )]
    fn x(&self, value: f64) -> i32 {
        self.left + (f64::from(self.width) * (value / self.most).clamp(0.0, 1.0)).round() as i32
    }
}

/// The median as a bar with its value at the right, the spread as a line with two ends.
fn bar(area: &Area<'_>, scale: &Scale, y: i32, spread: Spread, colour: RGBColor) -> DrawResult {
    let (zero, median) = (scale.x(0.0), scale.x(spread.median));
    area.draw(&Rectangle::new([(zero, y - 7), (median, y + 7)], colour.mix(0.45).filled()))?;
    let (least, most) = (scale.x(spread.least), scale.x(spread.most));
    if least < most {
        line(area, [(least, y), (most, y)], colour.mix(1.0))?;
        for x in [least, most] {
            line(area, [(x, y - 4), (x, y + 4)], colour.mix(1.0))?;
        }
    }
    area.draw(&Text::new(short(spread.median), (most.max(median) + 6, y), text(colour, HPos::Left)))?;
    Ok(())
}

fn line(area: &Area<'_>, ends: [(i32, i32); 2], colour: RGBAColor) -> DrawResult {
    Ok(area.draw(&PathElement::new(ends, colour.stroke_width(1)))?)
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::{run_of, sample};
    use super::*;

    #[test]
    fn a_chart_has_a_bar_for_each_relay_and_no_background() {
        let samples = [sample(1, "direct", 1000.0), sample(1, "landfall", 900.0), sample(1, "pasta", 500.0)];
        let run = run_of(&samples);
        let work = run.works().next().unwrap();
        let svg = chart(&run, work).unwrap().unwrap();
        assert!(svg.contains("0.900") && svg.contains("0.500"), "{svg}");
        assert!(svg.contains("requests/s, × direct (more is better)"), "{svg}");
        // Two relays in the relative panel; direct too in the other one.
        assert_eq!(svg.matches("<rect").count(), 2 + 3, "{svg}");
    }

    #[test]
    fn every_colour_is_readable_on_white_and_on_dark_grey() {
        let luminance = |RGBColor(red, green, blue): RGBColor| {
            let linear = |channel: u8| {
                let channel = f64::from(channel) / 255.0;
                if channel <= 0.04045 { channel / 12.92 } else { ((channel + 0.055) / 1.055).powf(2.4) }
            };
            0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue)
        };
        for colour in [TEXT, OURS, PEER] {
            for background in [RGBColor(255, 255, 255), RGBColor(13, 17, 23)] {
                let (one, other) = (luminance(colour) + 0.05, luminance(background) + 0.05);
                assert!(one.max(other) / one.min(other) >= 4.0, "{colour:?} on {background:?}");
            }
        }
    }
}
