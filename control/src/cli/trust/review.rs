//! The requests of the files of one folder. Each file is read once: what is printed is approved by the digest of the
//! same bytes.

use std::num::NonZeroU16;
use std::path::PathBuf;
use std::time::Duration;

use jiff::SignedDuration;
use serde_json::{Value, json};

use super::{failed, report_set_aside, timestamp};
use crate::cli::exit::{Exit, Failure};
use crate::cli::start::{self, Folder};
use crate::cli::ui::output::{Colour, Printer};
use crate::error::chain;
use crate::launch::devcontainer::{Devcontainer, exposure, exposure_of_file};
use crate::model::registration::FolderPorts;
use crate::model::trust::{ContentDigest, FolderFile, Trust};
use crate::registry::folder::{self, Demand, FolderError, Purpose};
use crate::registry::trust_file::TrustFile;
use crate::sys::paths::Home;

/// The files of a folder that request something.
#[derive(Debug)]
pub(super) struct Review {
    folder: String,
    path: PathBuf,
    settings: Option<FileRequests<folder::Folder>>,
    ports: Option<FileRequests<FolderPorts>>,
}

/// The requests of one file.
#[derive(Debug)]
struct FileRequests<T> {
    file: FolderFile,
    sha256: ContentDigest,
    state: State,
    content: T,
}

/// Whether a file is approved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Trusted,
    Changed,
    New,
}

impl State {
    fn of(trust: &Trust, folder: &std::path::Path, file: FolderFile, sha256: &ContentDigest) -> State {
        match trust.approval(folder, file) {
            Some(approval) if approval.sha256 == *sha256 => State::Trusted,
            Some(_) => State::Changed,
            None => State::New,
        }
    }

    fn describe(self) -> &'static str {
        match self {
            State::Trusted => "trusted",
            State::Changed => "not trusted: it changed since it was approved",
            State::New => "not trusted",
        }
    }
}

impl Review {
    /// Reads the files of a folder.
    pub(super) fn of(folder: &Folder, file: &TrustFile) -> Result<Review, Failure> {
        file.check_location(&folder.path).map_err(|error| {
            Failure::new(Exit::Refused, format!("{} {error}", folder.text))
                .hint("name another home with LANDFALL_HOME, or another folder")
        })?;
        // An unreadable list approves nothing; an approval starts a new list.
        let trust = file.read().unwrap_or_default();
        let state = |file, sha256: &ContentDigest| State::of(&trust, &folder.path, file, sha256);
        let unusable = |error: FolderError| {
            Failure::new(Exit::Usage, error.to_string()).hint(format!("see {}/{}", folder.text, folder::FILE))
        };
        let text = folder::read_file(&folder.path).map_err(|reason| unusable(FolderError::File(reason)))?;
        let settings = text
            .map(|text| {
                let (file, sha256) = (FolderFile::Settings, ContentDigest::of(text.as_bytes()));
                let content = folder::Folder::parse(&text).map_err(unusable)?;
                Ok(FileRequests { file, sha256, state: state(file, &sha256), content })
            })
            .transpose()?
            .filter(|requests| !requests.content.demands().is_empty());
        let (_, ports) = exposure_of_file(start::read(&folder.path)?, |declared| {
            exposure(None, None, Devcontainer::default(), declared)
        });
        let ports = ports.map(|content| {
            let (file, sha256) = (content.file, content.sha256);
            FileRequests { file, sha256, state: state(file, &sha256), content }
        });
        Ok(Review { folder: folder.text.clone(), path: folder.path.clone(), settings, ports })
    }

    pub(super) fn without_ports(self) -> Review {
        Review { ports: None, ..self }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.settings.is_none() && self.ports.is_none()
    }

    /// Returns whether all requests of the files are approved.
    pub(super) fn is_trusted(&self) -> bool {
        self.commands_are_trusted() && self.ports_are_trusted()
    }

    fn commands_are_trusted(&self) -> bool {
        self.settings.as_ref().is_none_or(|requests| requests.state == State::Trusted)
    }

    fn ports_are_trusted(&self) -> bool {
        self.ports.as_ref().is_none_or(|requests| requests.state == State::Trusted)
    }

    /// Returns a sentence that lists the requests without an approval.
    pub(super) fn withheld(&self) -> String {
        let mut parts = Vec::new();
        if !self.commands_are_trusted() {
            parts.push(format!("commands off: {} is not trusted", folder::FILE));
        }
        if let Some(requests) = self.ports.as_ref().filter(|requests| requests.state != State::Trusted) {
            let ports = list(&requests.content);
            parts.push(format!("ports {ports} off: {} is not trusted", requests.file));
        }
        parts.join("; ")
    }

    /// Returns a command line of `trust` for this folder.
    pub(super) fn command(&self, option: &str) -> String {
        command_for(&self.folder, option)
    }

    /// Approves the content that was read.
    pub(super) fn approve(&self, home: &Home, stderr: Printer) -> Result<(), Failure> {
        home.ensure_directories().map_err(|error| Failure::new(Exit::Failed, chain(&error)))?;
        let at = timestamp();
        let files = self.settings.iter().map(|requests| (requests.file, requests.sha256));
        let files: Vec<_> =
            files.chain(self.ports.iter().map(|requests| (requests.file, requests.sha256))).collect();
        let updated = TrustFile::of(home).update(|trust| {
            for (file, sha256) in files {
                trust.approve(&self.folder, file, sha256, at.clone());
            }
        });
        report_set_aside(&updated.map_err(|error| failed(&error))?, stderr);
        Ok(())
    }

    /// Prints the requests of the files, and whether they are approved.
    pub(super) fn show(&self, printer: Printer, as_json: bool) {
        if as_json {
            printer.print(&self.to_json().to_string());
            return;
        }
        self.print(printer);
        let files = self.settings.iter().map(|requests| (requests.file, requests.state));
        let files: Vec<_> =
            files.chain(self.ports.iter().map(|requests| (requests.file, requests.state))).collect();
        for (file, state) in &files {
            let colour = if *state == State::Trusted { Colour::Green } else { Colour::Yellow };
            printer.line("trust", colour, &format!("{file} is {}", state.describe()));
        }
        if files.is_empty() {
            printer.line(
                "trust",
                Colour::Grey,
                "the files of this folder request nothing that needs approval",
            );
        }
    }

    /// Prints the requests of the files.
    pub(super) fn print(&self, printer: Printer) {
        printer.line("folder", Colour::Grey, &self.folder);
        if let Some(requests) = &self.settings {
            printer.line("file", Colour::Grey, &format!("{}, sha256 {}", requests.file, requests.sha256));
            for demand in requests.content.demands() {
                let (word, text) = describe(&demand);
                printer.line(word, Colour::Yellow, &text);
            }
        }
        if let Some(requests) = &self.ports {
            printer.line("file", Colour::Grey, &format!("{}, sha256 {}", requests.file, requests.sha256));
            printer.line(
                "ports",
                Colour::Yellow,
                &format!("{} answer on localhost", list(&requests.content)),
            );
        }
    }

    pub(super) fn to_json(&self) -> Value {
        let file = |file: FolderFile, sha256: ContentDigest, state: State, asks: Value| {
            let (trusted, changed) = (state == State::Trusted, state == State::Changed);
            json!({ "file": file, "sha256": sha256, "trusted": trusted, "changed": changed, "asks": asks })
        };
        let settings = self.settings.iter().map(|requests| {
            let asks = requests.content.demands().iter().map(demand_json).collect();
            file(requests.file, requests.sha256, requests.state, asks)
        });
        let ports = self.ports.iter().map(|requests| {
            let asks = json!([{ "kind": "ports", "ports": requests.content.privileged }]);
            file(requests.file, requests.sha256, requests.state, asks)
        });
        let files: Vec<Value> = settings.chain(ports).collect();
        json!({ "folder": self.path, "trusted": self.is_trusted(), "files": files })
    }
}

/// Returns a command line of `trust` for a folder, quoted for a shell.
pub(super) fn command_for(folder: &str, option: &str) -> String {
    let option = if option.is_empty() { String::new() } else { format!("{option} ") };
    format!("landfall trust {option}{}", quoted(folder))
}

fn list(ports: &FolderPorts) -> String {
    ports.privileged.iter().map(NonZeroU16::to_string).collect::<Vec<_>>().join(", ")
}

fn describe(demand: &Demand<'_>) -> (&'static str, String) {
    match demand {
        Demand::Command { purpose, words, timeout } => {
            let words = words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
            let limit = timeout.map(|limit| format!(", at most {}", span(limit))).unwrap_or_default();
            ("command", format!("{}{limit}: {words}", when(purpose)))
        }
        Demand::FolderPrograms => {
            ("command", "trust-folder = true: commands may be programs of the folder itself".to_owned())
        }
        Demand::Secrets { file, keys } => {
            let keys = if keys.is_empty() { "no channel".to_owned() } else { keys.join(", ") };
            ("secrets", format!("the container may replace in {}: {keys}", quoted(file)))
        }
        Demand::Tools(names) => {
            ("tools", format!("requests {}; landfall grant gives a tool", names.join(", ")))
        }
    }
}

fn when(purpose: &Purpose<'_>) -> String {
    match purpose {
        Purpose::Preflight => "before each restart".to_owned(),
        Purpose::Stop => "at a restart, to stop".to_owned(),
        Purpose::Start => "at a restart, to start".to_owned(),
        Purpose::Gate { name } => format!("before each run of {name}"),
        Purpose::Job { name, every, restart } => {
            let then = if *restart { " and restart the container" } else { "" };
            format!("{name}, every {}{then}", span(*every))
        }
    }
}

fn demand_json(demand: &Demand<'_>) -> Value {
    match demand {
        Demand::Command { purpose, words, timeout } => {
            let mut value = json!({ "kind": "command", "command": words });
            if let Some(limit) = timeout {
                value["timeout"] = span(*limit).into();
            }
            match purpose {
                Purpose::Preflight => value["for"] = "preflight".into(),
                Purpose::Stop => value["for"] = "stop".into(),
                Purpose::Start => value["for"] = "start".into(),
                Purpose::Gate { name } => (value["for"], value["job"]) = ("gate".into(), (*name).into()),
                Purpose::Job { name, every, restart } => {
                    (value["for"], value["job"]) = ("job".into(), (*name).into());
                    (value["every"], value["restart"]) = (span(*every).into(), (*restart).into());
                }
            }
            value
        }
        Demand::FolderPrograms => json!({ "kind": "folder-programs" }),
        Demand::Secrets { file, keys } => json!({ "kind": "secrets", "file": file, "keys": keys }),
        Demand::Tools(names) => json!({ "kind": "tools", "wants": names }),
    }
}

/// Formats a duration in the notation of the file: `24h`, `1m 30s`.
fn span(duration: Duration) -> String {
    SignedDuration::try_from(duration).map_or_else(|_| format!("{duration:?}"), |span| format!("{span:#}"))
}

/// Quotes a word for a shell, so that its start and end are visible.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_@%+=:,./-".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_quoted_for_a_shell() {
        for (word, shown) in
            [("a-b=/c", "a-b=/c"), ("", "''"), ("a b", "'a b'"), ("it's", r"'it'\''s'"), ("$(x)", "'$(x)'")]
        {
            assert_eq!(quoted(word), shown);
        }
    }

    #[test]
    fn durations_are_short() {
        assert_eq!(span(Duration::from_secs(86_400)), "24h");
        assert_eq!(span(Duration::from_secs(90)), "1m 30s");
    }

    #[test]
    fn each_demand_is_one_line() {
        let text = r#"
            trust-folder = true
            [restart]
            stop = ["stop it"]
            start = ["start"]
            preflight = ["check"]
            [jobs.renew]
            command = ["renew", "--file", "a b"]
            gate = ["due"]
            every = "1d"
            restart = true
            [secrets]
            keys = ["k"]
            [tools]
            wants = ["claude"]
        "#;
        let folder = folder::Folder::parse(text).unwrap();
        let lines: Vec<String> =
            folder.demands().iter().map(describe).map(|(word, text)| format!("{word}: {text}")).collect();
        assert_eq!(
            lines,
            [
                "command: before each restart: check",
                "command: at a restart, to stop: 'stop it'",
                "command: at a restart, to start: start",
                "command: before each run of renew, at most 5m: due",
                "command: renew, every 24h and restart the container, at most 5m: renew --file 'a b'",
                "command: trust-folder = true: commands may be programs of the folder itself",
                "secrets: the container may replace in secrets.json: k",
                "tools: requests claude; landfall grant gives a tool",
            ]
        );
    }
}
