//! `landfall logs`: prints the daemon's log. Works whether the daemon runs or not.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use jiff::tz::TimeZone;

use super::args::LogsArgs;
use super::exit::{Exit, Failure};
use crate::cli::daemon_client;
use crate::cli::ui::output::Printer;
use crate::cli::ui::sentence::sentence;
use crate::error::chain;

/// The interval between reads of a followed log.
const POLL: Duration = Duration::from_millis(200);

/// Prints the last lines, and follows the log with `--follow`.
pub fn logs(args: &LogsArgs) -> Result<Exit, Failure> {
    let home = daemon_client::home()?;
    let path = home.daemon_log();
    let unreadable = |error: &io::Error| {
        let failure = Failure::new(Exit::Failed, format!("cannot read {}: {}", path.display(), chain(error)));
        match error.kind() {
            io::ErrorKind::NotFound => Failure::new(Exit::NoDaemon, "no daemon has run here yet")
                .hint("landfall up starts one; LANDFALL_HOME names another home"),
            _ => failure,
        }
    };
    let mut tail = Tail::open(&path).map_err(|error| unreadable(&error))?;
    let printer = Printer::to_stdout(args.json);
    let zone = TimeZone::system();
    let print = |line: &str| {
        if args.json { printer.try_print(line) } else { printer.try_print(&sentence(printer, line, &zone)) }
    };
    let now = tail.lines().map_err(|error| unreadable(&error))?;
    let mut last = rotated_lines(&path, args.lines.saturating_sub(now.len()));
    last.extend(now);
    let skipped = last.len().saturating_sub(args.lines);
    for line in last.iter().skip(skipped) {
        if print(line).is_err() {
            return Ok(Exit::Ok);
        }
    }
    if !args.follow {
        return Ok(Exit::Ok);
    }
    loop {
        for line in tail.lines().map_err(|error| unreadable(&error))? {
            // The reader has closed the pipe.
            if print(&line).is_err() {
                return Ok(Exit::Ok);
            }
        }
        thread::sleep(POLL);
    }
}

/// Returns the last lines of the rotated logs, the newest of which is `hostd.log.1`.
fn rotated_lines(path: &Path, wanted: usize) -> VecDeque<String> {
    let mut lines = VecDeque::new();
    for number in 1_u32.. {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{number}"));
        if lines.len() >= wanted {
            break;
        }
        let Ok(text) = std::fs::read(PathBuf::from(name)) else { break };
        let text = String::from_utf8_lossy(&text);
        for line in text.lines().rev().take(wanted - lines.len()) {
            lines.push_front(line.to_owned());
        }
    }
    lines
}

/// A log that is read as it grows, across rotations.
struct Tail {
    path: PathBuf,
    reader: BufReader<File>,
    /// The start of a line whose end is not written yet.
    partial: Vec<u8>,
}

impl Tail {
    fn open(path: &Path) -> io::Result<Tail> {
        let reader = BufReader::new(File::open(path)?);
        Ok(Tail { path: path.to_owned(), reader, partial: Vec::new() })
    }

    /// Returns all complete lines that are not read yet.
    fn lines(&mut self) -> io::Result<Vec<String>> {
        let mut lines = Vec::new();
        // The name is checked before the lines are read. The old file is then read to its end, so lines that are
        // written to it between the two steps are not lost; a rotation after the check is seen by the next call.
        let rotated = self.rotated();
        self.read_into(&mut lines)?;
        if let Some(next) = rotated {
            self.reader = BufReader::new(next);
            self.partial.clear();
            self.read_into(&mut lines)?;
        }
        Ok(lines)
    }

    fn read_into(&mut self, lines: &mut Vec<String>) -> io::Result<()> {
        loop {
            let count = self.reader.read_until(b'\n', &mut self.partial)?;
            if self.partial.last() != Some(&b'\n') {
                return Ok(());
            }
            self.partial.pop();
            lines.push(String::from_utf8_lossy(&self.partial).into_owned());
            self.partial.clear();
            if count == 0 {
                return Ok(());
            }
        }
    }

    /// Returns the file that has the name now, if it is a different file.
    fn rotated(&self) -> Option<File> {
        let next = File::open(&self.path).ok()?;
        let identity = |file: &File| file.metadata().ok().map(|file| (file.dev(), file.ino()));
        (identity(&next)? != identity(self.reader.get_ref())?).then_some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn append(path: &Path, text: &str) {
        let mut file = File::options().append(true).create(true).open(path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    #[test]
    fn a_log_is_followed_across_rotation_and_partial_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hostd.log");
        append(&path, "one\ntw");
        let mut tail = Tail::open(&path).unwrap();
        assert_eq!(tail.lines().unwrap(), ["one"]);
        append(&path, "o\n");
        assert_eq!(tail.lines().unwrap(), ["two"]);
        append(&path, "three\n");
        std::fs::rename(&path, folder.path().join("hostd.log.1")).unwrap();
        append(&path, "four\n");
        assert_eq!(tail.lines().unwrap(), ["three", "four"]);
        assert_eq!(tail.lines().unwrap(), Vec::<String>::new());
        std::fs::remove_file(&path).unwrap();
        assert_eq!(tail.lines().unwrap(), Vec::<String>::new(), "no new lines while the log has no name");
    }

    #[test]
    fn the_last_lines_come_from_rotated_logs_where_the_newest_is_short() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hostd.log");
        append(&folder.path().join("hostd.log.1"), "c\nd\n");
        append(&folder.path().join("hostd.log.2"), "a\nb\n");
        assert_eq!(rotated_lines(&path, 3), ["b", "c", "d"]);
        assert_eq!(rotated_lines(&path, 9), ["a", "b", "c", "d"]);
        assert_eq!(rotated_lines(&path, 0), Vec::<String>::new());
    }
}
