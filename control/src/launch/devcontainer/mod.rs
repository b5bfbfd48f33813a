//! `devcontainer.json`: which ports of a container answer on the host, what people are told of them, and what
//! `landfall start` runs. Pure but for [`Devcontainer::read`].
//!
//! The same fields come from the file in a folder and from a container's label `devcontainer.metadata`
//! (<https://containers.dev/implementors/reference/>, "Image metadata"); the label holds one object or a list of them, each
//! of which goes on top of those before it, and the file goes on top of the label:
//!
//! - `forwardPorts`: all of them together;
//! - `portsAttributes`: of one port or range, the last entry as a whole;
//! - `otherPortsAttributes`: the last one as a whole.
//!
//! # What they mean
//!
//! Everything that listens is forwarded in any case, so `forwardPorts` only names ports: those below 1024, which are
//! forwarded only when they are named, and those that are to answer though something else says `ignore`. A port that has
//! an entry of its own in `portsAttributes` is named as well, unless that says `ignore`. The metadata of an image names no port
//! below 1024: its author is not the host's user.
//!
//! | `onAutoForward` | |
//! | --- | --- |
//! | `ignore` | not exposed; in `otherPortsAttributes`: only what is named, and what a range is said about, is |
//! | `silent` | forwarded without a word |
//! | `notify`, `openBrowser`, `openBrowserOnce`, `openPreview` | forwarded and told; nothing is opened |
//!
//! `label` is shown beside the port. `requireLocalPort` is accepted: a port is never another one on the host. For a port
//! that several entries are about, one of its own counts before a range, and a narrow range before a wide one; what
//! an entry leaves open, the next one says. `otherPortsAttributes` is about ports without any entry.
//!
//! # What else says which ports
//!
//! From the strongest: options on the command line (`--allow`, `--deny`), the labels `dev.landfall.allow` and
//! `dev.landfall.deny`, the folder's file on top of the label `devcontainer.metadata` as above, and the default, everything
//! from 1024. Each replaces all that is weaker; what people are told of ports comes from the file and the label in any
//! case. [`exposure`] is that rule, for every verb and for the daemon.
//!
//! What landfall does not act on is listed by [`Devcontainer::not_used`]: regular expressions, ports of other hosts, and
//! every other field.

mod file;
mod folder_ports;
mod jsonc;
mod parse;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};

use thiserror::Error;

pub use folder_ports::{DevcontainerFile, exposure_of_file};

use crate::model::port_policy::{Allow, FIRST_UNPRIVILEGED, Policy, PortForward, PortList};
use crate::model::registration::PortNote;

/// The largest file or label, in bytes.
const BYTES_MAX: usize = 1024 * 1024;
/// The most entries in `portsAttributes`. They are written by hand; a label comes from whoever made an image.
const ENTRIES_MAX: usize = 512;

/// What one `devcontainer.json` says, or several put together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Devcontainer {
    forward: BTreeSet<NonZeroU16>,
    ports: BTreeMap<Ports, Attributes>,
    others: Option<Attributes>,
    image: Option<String>,
    build: Option<Build>,
    not_used: Vec<String>,
}

/// Why a text says nothing.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DevcontainerError {
    /// Nobody wrote this by hand.
    #[error("it is longer than {BYTES_MAX} bytes")]
    TooLong,
    /// Not even with comments and trailing commas.
    #[error("it is not JSON: {0}")]
    NotJson(String),
    /// It is JSON of another kind.
    #[error("it must be an object{or}", or = if *.list { ", or a list of objects" } else { "" })]
    NotAnObject {
        /// Whether a list is good as well.
        list: bool,
    },
    /// A field that is used does not fit.
    #[error("{field} must be {wanted}")]
    Field {
        /// Which, by its path.
        field: String,
        /// What fits.
        wanted: &'static str,
    },
    /// The file cannot be used.
    #[error("{} cannot be used: {why}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        why: String,
    },
}

/// What an image is built from. Paths are relative to the file's own directory, until it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Build {
    /// The Dockerfile.
    pub dockerfile: PathBuf,
    /// The folder that is sent to Docker.
    pub context: PathBuf,
}

/// What comes of all that is said of a container's ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exposure {
    /// Which may be exposed; none where nothing is said that differs from the default.
    pub policy: Option<PortForward>,
    /// What people are told of them.
    pub notes: Vec<PortNote>,
    /// What landfall does not act on, as [`Devcontainer::not_used`].
    pub not_used: Vec<String>,
}

/// Puts together what is said of a container's ports: on the command line, in its own labels `dev.landfall.*`, in its label
/// `devcontainer.metadata`, and in the folder's file.
pub fn exposure(
    options: Option<PortForward>,
    labels: Option<PortForward>,
    metadata: Devcontainer,
    folder: Devcontainer,
) -> Exposure {
    let said = metadata.merge(folder);
    let policy = options.or(labels).or_else(|| said.port_forward());
    Exposure { policy, notes: said.notes(), not_used: said.not_used }
}

impl Exposure {
    /// The same without the ports that the container's image denies.
    #[must_use]
    pub fn denying(mut self, image_deny: &PortList) -> Exposure {
        if !image_deny.is_empty() {
            let policy = Policy::from(&self.policy.unwrap_or_default());
            let deny = policy.deny.and(image_deny);
            self.policy = Some(PortForward::from(&Policy { deny, ..policy }));
        }
        self
    }
}

/// A port or a range of them; wide ones come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ports {
    first: NonZeroU16,
    last: NonZeroU16,
}

impl Ports {
    const ALL: Ports = Ports { first: NonZeroU16::MIN, last: NonZeroU16::MAX };

    fn is_one(self) -> bool {
        self.first == self.last
    }

    fn width(self) -> u16 {
        self.last.get() - self.first.get()
    }

    fn holds(self, other: Ports) -> bool {
        self.first <= other.first && other.last <= self.last
    }
}

impl Ord for Ports {
    fn cmp(&self, other: &Ports) -> std::cmp::Ordering {
        other.width().cmp(&self.width()).then(self.first.cmp(&other.first))
    }
}

impl PartialOrd for Ports {
    fn partial_cmp(&self, other: &Ports) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// What is said about a port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Attributes {
    label: Option<String>,
    on_auto_forward: Option<OnAutoForward>,
    /// An image has it: the port is not named by that.
    from_image: bool,
}

impl Attributes {
    fn or(&self, wider: &Attributes) -> Attributes {
        Attributes {
            label: self.label.clone().or_else(|| wider.label.clone()),
            on_auto_forward: self.on_auto_forward.or(wider.on_auto_forward),
            from_image: self.from_image,
        }
    }
}

/// What happens when a port begins to listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnAutoForward {
    Told,
    Silent,
    Ignore,
}

impl Devcontainer {
    /// Reads the text of a file.
    ///
    /// # Errors
    /// [`DevcontainerError`] says what does not fit, and where.
    pub fn parse(text: &str) -> Result<Devcontainer, DevcontainerError> {
        parse::file(text)
    }

    /// Reads what the folder says: `.devcontainer/devcontainer.json`, else `.devcontainer.json`; none if it has neither.
    ///
    /// # Errors
    /// [`DevcontainerError::File`] names the file.
    pub fn read(folder: &Path) -> Result<Option<DevcontainerFile>, DevcontainerError> {
        file::read(folder)
    }

    /// Nothing but `forwardPorts`.
    pub fn forwarding(ports: impl IntoIterator<Item = NonZeroU16>) -> Devcontainer {
        Devcontainer { forward: ports.into_iter().collect(), ..Devcontainer::default() }
    }

    /// The same as the metadata of an image: it names no port below 1024.
    fn of_image(mut self) -> Devcontainer {
        self.forward.retain(|port| port.get() >= FIRST_UNPRIVILEGED);
        self.ports.values_mut().for_each(|attributes| attributes.from_image = true);
        self
    }

    /// Puts `later` on top.
    #[must_use]
    pub fn merge(mut self, later: Devcontainer) -> Devcontainer {
        self.forward.extend(later.forward);
        self.ports.extend(later.ports);
        self.others = later.others.or(self.others);
        // An image takes the place of a build, and the other way round.
        if later.image.is_some() || later.build.is_some() {
            (self.image, self.build) = (later.image, later.build);
        }
        for name in later.not_used {
            if !self.not_used.contains(&name) {
                self.not_used.push(name);
            }
        }
        self
    }

    /// Which ports may be exposed; none where nothing is said that differs from the default.
    pub fn port_forward(&self) -> Option<PortForward> {
        let ignores = |attributes: &Attributes| attributes.on_auto_forward == Some(OnAutoForward::Ignore);
        let only_named = self.others.as_ref().is_some_and(ignores);
        let mut ignored = vec![only_named; usize::from(u16::MAX) + 1];
        let mut named = self.forward.clone();
        for (ports, attributes) in self.resolved() {
            ignored[usize::from(ports.first.get())..=usize::from(ports.last.get())]
                .fill(ignores(&attributes));
            if ports.is_one() && !ignores(&attributes) && !attributes.from_image {
                named.insert(ports.first);
            }
        }
        for port in &self.forward {
            ignored[usize::from(port.get())] = false;
        }
        let is_ignored = |port: NonZeroU16| ignored[usize::from(port.get())];
        let all = (1..=u16::MAX).filter_map(NonZeroU16::new);
        let is_privileged = |port: NonZeroU16| port.get() < FIRST_UNPRIVILEGED;
        let policy = if only_named {
            let allowed =
                |port: &NonZeroU16| !is_ignored(*port) && (!is_privileged(*port) || named.contains(port));
            PortForward { allow: Allow::Ports(all.filter(allowed).collect()), deny: None, privileged: None }
        } else {
            let some = |ports: BTreeSet<NonZeroU16>| (!ports.is_empty()).then_some(ports);
            let denied = all.filter(|port| is_ignored(*port) && !is_privileged(*port)).collect();
            let privileged = named.into_iter().filter(|port| is_privileged(*port)).collect();
            PortForward { allow: Allow::All, deny: some(denied), privileged: some(privileged) }
        };
        (policy != PortForward::default()).then_some(policy)
    }

    /// What people are told of its ports. For a port that several are about, the last one counts.
    pub fn notes(&self) -> Vec<PortNote> {
        let others = self.others.clone().map(|others| (Ports::ALL, others));
        let mut notes: Vec<PortNote> = Vec::new();
        for (ports, attributes) in others.into_iter().chain(self.resolved()) {
            let silent = attributes.on_auto_forward == Some(OnAutoForward::Silent);
            // One that says nothing matters only where a wider one says something.
            if attributes.label.is_some() || silent || !notes.is_empty() {
                notes.push(PortNote {
                    first: ports.first,
                    last: ports.last,
                    label: attributes.label,
                    silent,
                });
            }
        }
        notes
    }

    /// The image that the container is made from.
    pub fn image(&self) -> Option<&str> {
        self.image.as_deref()
    }

    /// What its image is built from.
    pub fn build(&self) -> Option<&Build> {
        self.build.as_ref()
    }

    /// What is said that landfall does not act on, by the names of the fields. They are somebody's own words: escape them
    /// before they reach a terminal.
    pub fn not_used(&self) -> &[String] {
        &self.not_used
    }

    /// Every entry, the wide ones first, with what it leaves open filled in from the narrowest range around it.
    fn resolved(&self) -> impl Iterator<Item = (Ports, Attributes)> {
        self.ports.iter().enumerate().map(|(at, (ports, attributes))| {
            let around = self.ports.iter().take(at).filter(|(wider, _)| wider.holds(*ports));
            // From the widest to the narrowest, each on top of those before it.
            let around = around.fold(Attributes::default(), |wider, (_, narrower)| narrower.or(&wider));
            (*ports, attributes.or(&around))
        })
    }
}

/// Reads a container's label `devcontainer.metadata`. `image` is the same label of its image: its entries, which a dev
/// container tool repeats in that of the container, open no port below 1024.
///
/// # Errors
/// [`DevcontainerError`] says what does not fit, and where.
pub fn from_metadata(label: &str, image: Option<&str>) -> Result<Devcontainer, DevcontainerError> {
    parse::label(label, image)
}

#[cfg(test)]
mod tests;
