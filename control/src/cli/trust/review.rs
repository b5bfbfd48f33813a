//! What the files of one folder ask for, each read once: printed, and approved by the digest of what was printed.

use std::num::NonZeroU16;
use std::path::PathBuf;
use std::time::Duration;

use jiff::SignedDuration;
use serde_json::{Value, json};

use super::{failed, report_set_aside, timestamp};
use crate::cli::exit::{Exit, Failure};
use crate::cli::start::{self, Folder};
use crate::cli::ui::output::{Colour, Talk};
use crate::error::chain;
use crate::launch::devcontainer::{Devcontainer, exposure, exposure_of_file};
use crate::model::registration::FolderPorts;
use crate::model::trust::{ContentDigest, FolderFile, Trust};
use crate::registry::folder::{self, Demand, FolderError, Purpose};
use crate::registry::trust_file::TrustFile;
use crate::sys::paths::Home;

/// The files of a folder that ask for something.
#[derive(Debug)]
pub(super) struct Review {
    folder: String,
    path: PathBuf,
    settings: Option<Asked<folder::Folder>>,
    ports: Option<Asked<FolderPorts>>,
}

/// One file.
#[derive(Debug)]
struct Asked<T> {
    file: FolderFile,
    sha256: ContentDigest,
    state: State,
    what: T,
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

    fn in_words(self) -> &'static str {
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
        file.check_place(&folder.path).map_err(|error| {
            Failure::new(Exit::Refused, format!("{} {error}", folder.text))
                .hint("name another home with LANDFALL_HOME, or another folder")
        })?;
        // A list of approvals that cannot be believed approves nothing; approving starts a new one.
        let trust = file.read().unwrap_or_default();
        let state = |file, sha256: &ContentDigest| State::of(&trust, &folder.path, file, sha256);
        let unusable = |error: FolderError| {
            Failure::new(Exit::Usage, error.to_string()).hint(format!("see {}/{}", folder.text, folder::FILE))
        };
        let text = folder::read_file(&folder.path).map_err(|reason| unusable(FolderError::File(reason)))?;
        let settings = text
            .map(|text| {
                let (file, sha256) = (FolderFile::Settings, ContentDigest::of(text.as_bytes()));
                let what = folder::Folder::parse(&text).map_err(unusable)?;
                Ok(Asked { file, sha256, state: state(file, &sha256), what })
            })
            .transpose()?
            .filter(|asked| !asked.what.demands().is_empty());
        let (_, ports) = exposure_of_file(start::read(&folder.path)?, |said| {
            exposure(None, None, Devcontainer::default(), said)
        });
        let ports = ports.map(|what| {
            let (file, sha256) = (what.file, what.sha256);
            Asked { file, sha256, state: state(file, &sha256), what }
        });
        Ok(Review { folder: folder.text.clone(), path: folder.path.clone(), settings, ports })
    }

    pub(super) fn without_ports(self) -> Review {
        Review { ports: None, ..self }
    }

    pub(super) fn asks_for_nothing(&self) -> bool {
        self.settings.is_none() && self.ports.is_none()
    }

    /// Whether everything that the files ask for is approved.
    pub(super) fn is_trusted(&self) -> bool {
        self.commands_are_trusted() && self.ports_are_trusted()
    }

    fn commands_are_trusted(&self) -> bool {
        self.settings.as_ref().is_none_or(|asked| asked.state == State::Trusted)
    }

    fn ports_are_trusted(&self) -> bool {
        self.ports.as_ref().is_none_or(|asked| asked.state == State::Trusted)
    }

    /// What is off without an approval, as a sentence.
    pub(super) fn withheld(&self) -> String {
        let mut parts = Vec::new();
        if !self.commands_are_trusted() {
            parts.push(format!("commands off: {} is not trusted", folder::FILE));
        }
        if let Some(asked) = self.ports.as_ref().filter(|asked| asked.state != State::Trusted) {
            let ports = list(&asked.what);
            parts.push(format!("ports {ports} off: {} is not trusted", asked.file));
        }
        parts.join("; ")
    }

    /// A command line of `trust` for this folder.
    pub(super) fn command(&self, option: &str) -> String {
        command_for(&self.folder, option)
    }

    /// Approves the content that was read.
    pub(super) fn approve(&self, home: &Home, aside: Talk) -> Result<(), Failure> {
        home.ensure_directories().map_err(|error| Failure::new(Exit::Failed, chain(&error)))?;
        let at = timestamp();
        let files = self.settings.iter().map(|asked| (asked.file, asked.sha256));
        let files: Vec<_> = files.chain(self.ports.iter().map(|asked| (asked.file, asked.sha256))).collect();
        let updated = TrustFile::of(home).update(|trust| {
            for (file, sha256) in files {
                trust.approve(&self.folder, file, sha256, at.clone());
            }
        });
        report_set_aside(&updated.map_err(|error| failed(&error))?, aside);
        Ok(())
    }

    /// Prints what the files ask for, and whether they are approved.
    pub(super) fn show(&self, talk: Talk, as_json: bool) {
        if as_json {
            talk.plain(&self.to_json().to_string());
            return;
        }
        self.print(talk);
        let files = self.settings.iter().map(|asked| (asked.file, asked.state));
        let files: Vec<_> = files.chain(self.ports.iter().map(|asked| (asked.file, asked.state))).collect();
        for (file, state) in &files {
            let colour = if *state == State::Trusted { Colour::Green } else { Colour::Yellow };
            talk.line("trust", colour, &format!("{file} is {}", state.in_words()));
        }
        if files.is_empty() {
            talk.line("trust", Colour::Grey, "the files of this folder ask for nothing that needs approval");
        }
    }

    /// Prints what the files ask for.
    pub(super) fn print(&self, talk: Talk) {
        talk.line("folder", Colour::Grey, &self.folder);
        if let Some(asked) = &self.settings {
            talk.line("file", Colour::Grey, &format!("{}, sha256 {}", asked.file, asked.sha256));
            for demand in asked.what.demands() {
                let (word, text) = in_words(&demand);
                talk.line(word, Colour::Yellow, &text);
            }
        }
        if let Some(asked) = &self.ports {
            talk.line("file", Colour::Grey, &format!("{}, sha256 {}", asked.file, asked.sha256));
            talk.line("ports", Colour::Yellow, &format!("{} answer on localhost", list(&asked.what)));
        }
    }

    pub(super) fn to_json(&self) -> Value {
        let file = |file: FolderFile, sha256: ContentDigest, state: State, asks: Value| {
            let (trusted, changed) = (state == State::Trusted, state == State::Changed);
            json!({ "file": file, "sha256": sha256, "trusted": trusted, "changed": changed, "asks": asks })
        };
        let settings = self.settings.iter().map(|asked| {
            let asks = asked.what.demands().iter().map(demand_json).collect();
            file(asked.file, asked.sha256, asked.state, asks)
        });
        let ports = self.ports.iter().map(|asked| {
            let asks = json!([{ "kind": "ports", "ports": asked.what.privileged }]);
            file(asked.file, asked.sha256, asked.state, asks)
        });
        let files: Vec<Value> = settings.chain(ports).collect();
        json!({ "folder": self.path, "trusted": self.is_trusted(), "files": files })
    }
}

/// A command line of `trust` for a folder, as a shell takes it.
pub(super) fn command_for(folder: &str, option: &str) -> String {
    let option = if option.is_empty() { String::new() } else { format!("{option} ") };
    format!("landfall trust {option}{}", quoted(folder))
}

fn list(ports: &FolderPorts) -> String {
    ports.privileged.iter().map(NonZeroU16::to_string).collect::<Vec<_>>().join(", ")
}

fn in_words(demand: &Demand<'_>) -> (&'static str, String) {
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
            ("tools", format!("asks for {}; landfall grant gives a tool", names.join(", ")))
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
            let mut told = json!({ "kind": "command", "command": words });
            if let Some(limit) = timeout {
                told["timeout"] = span(*limit).into();
            }
            match purpose {
                Purpose::Preflight => told["for"] = "preflight".into(),
                Purpose::Stop => told["for"] = "stop".into(),
                Purpose::Start => told["for"] = "start".into(),
                Purpose::Gate { name } => (told["for"], told["job"]) = ("gate".into(), (*name).into()),
                Purpose::Job { name, every, restart } => {
                    (told["for"], told["job"]) = ("job".into(), (*name).into());
                    (told["every"], told["restart"]) = (span(*every).into(), (*restart).into());
                }
            }
            told
        }
        Demand::FolderPrograms => json!({ "kind": "folder-programs" }),
        Demand::Secrets { file, keys } => json!({ "kind": "secrets", "file": file, "keys": keys }),
        Demand::Tools(names) => json!({ "kind": "tools", "wants": names }),
    }
}

/// A duration as the file has it: `24h`, `1m 30s`.
fn span(duration: Duration) -> String {
    SignedDuration::try_from(duration).map_or_else(|_| format!("{duration:?}"), |span| format!("{span:#}"))
}

/// A word as a shell takes it, so that its borders are visible.
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
    fn a_word_shows_its_borders() {
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
            folder.demands().iter().map(in_words).map(|(word, text)| format!("{word}: {text}")).collect();
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
                "tools: asks for claude; landfall grant gives a tool",
            ]
        );
    }
}
