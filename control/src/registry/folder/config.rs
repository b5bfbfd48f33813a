//! Parses the text of `landfall.toml`. Pure.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use jiff::{Span, SpanRelativeTo};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _};

use super::{FolderError, JOB_TIMEOUT};

/// The shortest interval and the shortest time limit of a job.
const DURATION_MIN: Duration = Duration::from_secs(1);
/// The longest interval and the longest time limit of a job.
const DURATION_MAX: Duration = Duration::from_secs(366 * 24 * 3_600);
/// The maximum number of jobs of one folder, so that one folder cannot exhaust the daemon.
const JOBS_MAX: usize = 32;
/// The longest name of a job, in bytes.
const JOB_NAME_BYTES_MAX: usize = 64;
/// The maximum number of tools of one folder, and the longest name of a tool, in bytes: the limits of tool definitions.
const TOOLS_MAX: usize = 64;
const TOOL_NAME_BYTES_MAX: usize = 64;

/// The configuration of a folder.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Folder {
    /// No process in a container writes to this folder, so its commands may be programs in it.
    #[serde(default)]
    pub trust_folder: bool,
    /// The commands of a restart.
    #[serde(default)]
    pub restart: Restart,
    /// Jobs by name.
    #[serde(default, deserialize_with = "jobs")]
    pub jobs: BTreeMap<String, Job>,
    /// The parts that `secrets-patch` may replace.
    #[serde(default)]
    pub secrets: Option<Secrets>,
    /// Tools of the host that the container's programs use.
    #[serde(default)]
    pub tools: Option<Tools>,
}

/// The commands of a restart. Either both of `stop` and `start` are present, or neither is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Restart {
    /// Stops the container. Without it, Docker is used.
    #[serde(default, deserialize_with = "command")]
    pub stop: Option<Vec<String>>,
    /// Starts it. `LANDFALL_BUILD` is `1` if its image is to be built, else `0`.
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
    /// The interval from one run to the next.
    #[serde(deserialize_with = "duration")]
    pub every: Duration,
    /// Runs before each run; status 0 permits the run.
    #[serde(default, deserialize_with = "command")]
    pub gate: Option<Vec<String>>,
    /// The time limit of the command, and of the gate.
    #[serde(default = "job_timeout", deserialize_with = "duration")]
    pub timeout: Duration,
    /// Whether a successful run restarts the container.
    #[serde(default)]
    pub restart: bool,
}

/// The parts that `secrets-patch` may replace.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Secrets {
    /// The file, directly in the folder.
    #[serde(default = "secrets_file", deserialize_with = "file_name")]
    pub file: PathBuf,
    /// The keys of `channels` that may be replaced.
    pub keys: Vec<String>,
}

/// Tools of the host that the container's programs use. This does not grant them.
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
    /// [`FolderError::Line`] with the line and the reason.
    pub fn parse(text: &str) -> Result<Folder, FolderError> {
        let folder: Folder = toml::from_str(text).map_err(|error| {
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            // The parser's message may have several lines; join them.
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

/// Parses a duration such as `24h`, `90 minutes` or `1d 12h`. A day has 24 hours.
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

/// Parses the name of a file directly in the folder.
fn file_name<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    let text = String::deserialize(from)?;
    let path = Path::new(&text);
    let mut parts = path.components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(_)), None) if !text.contains(['/', '\0']) => Ok(path.to_owned()),
        _ => Err(D::Error::custom(format!("{text:?} is not the name of a file in the folder"))),
    }
}
