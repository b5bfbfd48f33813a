//! Prints the tables of a run, and writes its page and its charts: `report RUN.jsonl [--into DIRECTORY]`.

use std::io::Write;
use std::path::Path;

use landfall_benches::report::{Run, chart, document, tables};
use landfall_benches::{Failure, option};

fn main() -> Result<(), Failure> {
    let path = std::env::args().nth(1).ok_or("usage: report RUN.jsonl [--into DIRECTORY]")?;
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    let run = Run::parse(&text).map_err(|error| format!("{path}: {error}"))?;
    let into = option("--into", "")?;
    if !into.is_empty() {
        write(&run, Path::new(&into)).map_err(|error| format!("{into}: {error}"))?;
    }
    Ok(write!(std::io::stdout(), "{}", tables(&run))?)
}

fn write(run: &Run, directory: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(directory)?;
    std::fs::write(directory.join("README.md"), document(run))?;
    for work in run.works() {
        if let Some(svg) = chart(run, work)? {
            std::fs::write(directory.join(format!("{}.svg", work.name)), svg)?;
        }
    }
    Ok(())
}
