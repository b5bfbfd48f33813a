//! Prints the tables of a run: `report RUN.jsonl [--into DIRECTORY] [--publish ROOT]`.
//!
//! With `--into` it writes the page and the charts of the run to a directory. With `--publish` it also writes the figures
//! into the pages of the checkout ROOT whose directory `benches/results/relays` is that directory.

use std::io::Write;
use std::path::Path;

use landfall_benches::report::{END, Run, START, chart, charts, document, headline, replace, tables};
use landfall_benches::{Failure, option};

/// The published run, from the root of the checkout.
const PUBLISHED: &str = "benches/results/relays";

fn main() -> Result<(), Failure> {
    let path =
        std::env::args().nth(1).ok_or("usage: report RUN.jsonl [--into DIRECTORY] [--publish ROOT]")?;
    let run = read(Path::new(&path))?;
    let (into, root) = (option("--into", "")?, option("--publish", "")?);
    if !into.is_empty() {
        std::fs::create_dir_all(&into)?;
        write(Path::new(&into), files(&run)?)?;
    }
    if !root.is_empty() {
        let root = Path::new(&root);
        write(root, pages(&run, root)?)?;
    }
    Ok(write!(std::io::stdout(), "{}", tables(&run))?)
}

fn read(path: &Path) -> Result<Run, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Run::parse(&text).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// The files beside the samples, by name.
fn files(run: &Run) -> Result<Vec<(String, String)>, Failure> {
    let mut files = vec![("README.md".to_owned(), document(run))];
    for work in run.works() {
        if let Some(svg) = chart(run, work)? {
            files.push((format!("{}.svg", work.name), svg));
        }
    }
    Ok(files)
}

/// The pages of the checkout that show figures, by their path from its root.
fn pages(run: &Run, root: &Path) -> Result<Vec<(String, String)>, Failure> {
    let parts = [
        ("README.md", headline(run, PUBLISHED)),
        ("benches/README.md", charts(run, PUBLISHED.trim_start_matches("benches/"))),
    ];
    let page = |(name, part): (&str, String)| {
        let text = std::fs::read_to_string(root.join(name)).map_err(|error| format!("{name}: {error}"))?;
        let page =
            replace(&text, &part).ok_or(format!("{name}: {START:?} and {END:?} are not both in it"))?;
        Ok((name.to_owned(), page))
    };
    parts.into_iter().map(page).collect()
}

fn write(directory: &Path, files: Vec<(String, String)>) -> Result<(), Failure> {
    for (name, text) in files {
        std::fs::write(directory.join(&name), text).map_err(|error| format!("{name}: {error}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every published figure comes from the samples of the published run.
    #[test]
    fn published_pages_match_the_samples() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let published = root.join(PUBLISHED);
        let samples = published.join("run.jsonl");
        if !samples.exists() {
            return;
        }
        let run = read(&samples).unwrap();
        let pages = pages(&run, root).unwrap().into_iter().map(|(name, text)| (root.join(name), text));
        let files = files(&run).unwrap().into_iter().map(|(name, text)| (published.join(name), text));
        for (path, text) in files.chain(pages) {
            assert!(
                std::fs::read_to_string(&path).unwrap() == text,
                "{} differs from what `report` makes of the samples",
                path.display()
            );
        }
    }
}
