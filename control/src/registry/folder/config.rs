//! The text of `landfall.toml`, parsed. Pure.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use jiff::{Span, SpanRelativeTo};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _};

use super::{FolderError, JOB_TIMEOUT};

/// The shortest interval of a job, and the shortest bound of one.
const DURATION_MIN: Duration = Duration::from_secs(1);
/// The longest.
const DURATION_MAX: Duration = Duration::from_secs(366 * 24 * 3_600);
/// The most jobs of one folder, so that one folder cannot fill the daemon.
const JOBS_MAX: usize = 32;
/// The longest name of a job, in bytes.
const JOB_NAME_BYTES_MAX: usize = 64;
/// The most tools that one folder asks for, and the longest name of a tool, in bytes: those of the definitions of tools.
const TOOLS_MAX: usize = 64;
const TOOL_NAME_BYTES_MAX: usize = 64;

/// What a folder configures.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Folder {
    /// Nothing in a container writes to this folder: its commands may be programs in it.
    #[serde(default)]
    pub trust_folder: bool,
    /// How to restart.
    #[serde(default)]
    pub restart: Restart,
    /// Jobs by their names.
    #[serde(default, deserialize_with = "jobs")]
    pub jobs: BTreeMap<String, Job>,
    /// What may be replaced by `secrets-patch`.
    #[serde(default)]
    pub secrets: Option<Secrets>,
    /// Tools of the host that the container's programs use.
    #[serde(default)]
    pub tools: Option<Tools>,
}

/// How to restart. There are both of `stop` and `start`, or neither.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Restart {
    /// Ends the container, in place of Docker.
    #[serde(default, deserialize_with = "command")]
    pub stop: Option<Vec<String>>,
    /// Starts it. `LANDFALL_BUILD` is `1` when it is to be built anew, else `0`.
    #[serde(default, deserialize_with = "command")]
    pub start: Option<Vec<String>>,
    /// Refuses a restart by a status other than 0.
    #[serde(default, deserialize_with = "command")]
    pub preflight: Option<Vec<String>>,
}

/// A command that runs at intervals.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Job {
    /// The program and its arguments.
    #[serde(deserialize_with = "needed_command")]
    pub command: Vec<String>,
    /// From one run to the next.
    #[serde(deserialize_with = "duration")]
    pub every: Duration,
    /// Asked before each run: status 0 means run.
    #[serde(default, deserialize_with = "command")]
    pub gate: Option<Vec<String>>,
    /// How long the command, and the gate, may take.
    #[serde(default = "job_timeout", deserialize_with = "duration")]
    pub timeout: Duration,
    /// Whether a run that succeeded restarts the container.
    #[serde(default)]
    pub restart: bool,
}

/// What may be replaced by `secrets-patch`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Secrets {
    /// The file, in the folder itself.
    #[serde(default = "secrets_file", deserialize_with = "file_name")]
    pub file: PathBuf,
    /// The keys of `channels` that may be replaced.
    pub keys: Vec<String>,
}

/// Tools of the host that the container's programs use. This grants none of them.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Tools {
    /// Their names.
    #[serde(deserialize_with = "tool_names")]
    pub wants: Vec<String>,
}

impl Folder {
    /// Parses the text of a file.
    ///
    /// # Errors
    /// [`FolderError::Line`] says where and why.
    pub fn parse(text: &str) -> Result<Folder, FolderError> {
        let folder: Folder = toml::from_str(text).map_err(|error| {
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            // The parser's sentence may have several lines; ours is one.
            let reason = error.message().split('\n').map(str::trim).collect::<Vec<_>>().join(", ");
            FolderError::Line { line: 1 + before.matches('\n').count(), reason }
        })?;
        if folder.restart.stop.is_some() != folder.restart.start.is_some() {
            let line =
                1 + text.lines().position(|line| line.trim_start().starts_with("[restart]")).unwrap_or(0);
            return Err(FolderError::Line { line, reason: "stop and start need each other".to_owned() });
        }
        Ok(folder)
    }
}

fn job_timeout() -> Duration {
    JOB_TIMEOUT
}

fn secrets_file() -> PathBuf {
    PathBuf::from("secrets.json")
}

fn jobs<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, Job>, D::Error> {
    let jobs = BTreeMap::<String, Job>::deserialize(from)?;
    if jobs.len() > JOBS_MAX {
        return Err(D::Error::custom(format!("{} jobs are more than {JOBS_MAX}", jobs.len())));
    }
    match jobs.keys().find(|name| !is_name(name, JOB_NAME_BYTES_MAX)) {
        Some(name) => Err(D::Error::custom(format!(
            "a job's name is at most {JOB_NAME_BYTES_MAX} letters, digits, - and _; {name:?} is not"
        ))),
        None => Ok(jobs),
    }
}

fn tool_names<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    let names = Vec::<String>::deserialize(from)?;
    if names.len() > TOOLS_MAX {
        return Err(D::Error::custom(format!("{} tools are more than {TOOLS_MAX}", names.len())));
    }
    match names.iter().find(|name| !is_name(name, TOOL_NAME_BYTES_MAX)) {
        Some(name) => Err(D::Error::custom(format!(
            "a tool's name is at most {TOOL_NAME_BYTES_MAX} letters, digits, - and _; {name:?} is not"
        ))),
        None => Ok(names),
    }
}

fn is_name(name: &str, bytes_max: usize) -> bool {
    (1..=bytes_max).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
}

fn needed_command<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    let words = Vec::<String>::deserialize(from)?;
    if words.first().is_none_or(String::is_empty) {
        return Err(D::Error::custom("a command has at least the name of a program"));
    }
    if words.iter().any(|word| word.contains('\0')) {
        return Err(D::Error::custom("a command holds no NUL"));
    }
    Ok(words)
}

fn command<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<String>>, D::Error> {
    needed_command(from).map(Some)
}

/// A duration as people write it: `24h`, `90 minutes`, `1d 12h`. A day has 24 hours.
fn duration<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(from)?;
    let duration = text
        .parse::<Span>()
        .and_then(|span| span.to_duration(SpanRelativeTo::days_are_24_hours()))
        .ok()
        .and_then(|duration| Duration::try_from(duration).ok())
        .ok_or_else(|| D::Error::custom(format!("{text:?} is not a duration such as \"24h\" or \"90s\"")))?;
    if !(DURATION_MIN..=DURATION_MAX).contains(&duration) {
        return Err(D::Error::custom(format!("{text:?} is not between a second and a year")));
    }
    Ok(duration)
}

/// A name in the folder itself: no way leads out of it.
fn file_name<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    let text = String::deserialize(from)?;
    let path = Path::new(&text);
    let mut parts = path.components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(_)), None) if !text.contains(['/', '\0']) => Ok(path.to_owned()),
        _ => Err(D::Error::custom(format!("{text:?} is not the name of a file in the folder"))),
    }
}
