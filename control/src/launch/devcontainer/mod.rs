//! `devcontainer.json`: the ports of a container that answer on the host, the notes about them, and the image that
//! `landfall start` runs. Pure except for [`Devcontainer::read`].
//!
//! The same fields come from the file in a folder and from a container's label `devcontainer.metadata`
//! (<https://containers.dev/implementors/reference/>, "Image metadata"). The label holds one object or a list of them.
//! Each object overrides those before it, and the file overrides the label:
//!
//! - `forwardPorts`: the union;
//! - `portsAttributes`: for each port or range, the last entry as a whole;
//! - `otherPortsAttributes`: the last one as a whole.
//!
//! # Their meaning
//!
//! All listeners are forwarded in any case, so `forwardPorts` only names ports: those below 1024, which are forwarded
//! only if they are named, and those that another entry sets to `ignore`. A port with its own entry in
//! `portsAttributes` is named as well, unless that entry says `ignore`. The metadata of an image names no port below
//! 1024, since the author of an image is not the host's user.
//!
//! | `onAutoForward` | |
//! | --- | --- |
//! | `ignore` | not exposed; in `otherPortsAttributes`: only named ports, and ports of a range that has an entry, are
//! exposed |
//! | `silent` | forwarded without a report |
//! | `notify`, `openBrowser`, `openBrowserOnce`, `openPreview` | forwarded and reported; no browser is opened |
//!
//! `label` is shown next to the port. `requireLocalPort` is accepted without effect: a port never has another number on
//! the host. If several entries apply to a port, an entry of its own overrides a range, and a narrow range overrides a
//! wide one; attributes that an entry lacks come from the next one. `otherPortsAttributes` applies to ports without any
//! entry.
//!
//! # Other sources of the port policy
//!
//! In order of precedence: options on the command line (`--allow`, `--deny`), the labels `dev.landfall.allow` and
//! `dev.landfall.deny`, the folder's file merged over the label `devcontainer.metadata` as above, and the default,
//! which is every port from 1024. Each source replaces all that follow; the notes about ports always come from the file
//! and the label. [`exposure`] implements this rule for all verbs and for the daemon.
//!
//! [`Devcontainer::not_used`] lists the fields without effect: regular expressions, ports of other hosts, and all other
//! fields.

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
/// The maximum of entries in `portsAttributes`. A file is written by hand, but a label comes from the author of an
/// image.
const ENTRIES_MAX: usize = 512;

/// The content of one `devcontainer.json`, or of several merged ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Devcontainer {
    forward: BTreeSet<NonZeroU16>,
    ports: BTreeMap<Ports, Attributes>,
    others: Option<Attributes>,
    image: Option<String>,
    build: Option<Build>,
    not_used: Vec<String>,
}

/// The reason why a text is invalid.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DevcontainerError {
    /// The text exceeds the limit.
    #[error("it is longer than {BYTES_MAX} bytes")]
    TooLong,
    /// The text is not JSON, even with comments and trailing commas.
    #[error("it is not JSON: {0}")]
    NotJson(String),
    /// The text is JSON of another type.
    #[error("it must be an object{or}", or = if *.list { ", or a list of objects" } else { "" })]
    NotAnObject {
        /// Whether a list is also accepted.
        list: bool,
    },
    /// A supported field has an invalid value.
    #[error("{field} must be {wanted}")]
    Field {
        /// The path of the field.
        field: String,
        /// The valid values.
        wanted: &'static str,
    },
    /// The file cannot be used.
    #[error("{} cannot be used: {why}", path.display())]
    File {
        /// The path.
        path: PathBuf,
        /// The reason.
        why: String,
    },
}

/// The source of an image build. Paths are relative to the file's directory until [`Devcontainer::read`] resolves them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Build {
    /// The Dockerfile.
    pub dockerfile: PathBuf,
    /// The folder that is sent to Docker.
    pub context: PathBuf,
}

/// The result of merging all sources about a container's ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exposure {
    /// The port policy; `None` if it is the default.
    pub policy: Option<PortForward>,
    /// The notes about ports.
    pub notes: Vec<PortNote>,
    /// The fields without effect; see [`Devcontainer::not_used`].
    pub not_used: Vec<String>,
}

/// Merges all sources about a container's ports: the command line, its labels `dev.landfall.*`, its label
/// `devcontainer.metadata`, and the folder's file.
pub fn exposure(
    options: Option<PortForward>,
    labels: Option<PortForward>,
    metadata: Devcontainer,
    folder: Devcontainer,
) -> Exposure {
    let declared = metadata.merge(folder);
    let policy = options.or(labels).or_else(|| declared.port_forward());
    Exposure { policy, notes: declared.notes(), not_used: declared.not_used }
}

impl Exposure {
    /// Removes the ports that the container's image denies.
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

/// A port or a range of ports. Wide ranges are ordered before narrow ones.
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

/// The attributes of a port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Attributes {
    label: Option<String>,
    on_auto_forward: Option<OnAutoForward>,
    /// Whether an image has the entry: then it does not name the port.
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

/// The reaction to a new listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnAutoForward {
    Notify,
    Silent,
    Ignore,
}

impl Devcontainer {
    /// Parses the text of a file.
    ///
    /// # Errors
    /// [`DevcontainerError`] names the invalid field.
    pub fn parse(text: &str) -> Result<Devcontainer, DevcontainerError> {
        parse::file(text)
    }

    /// Reads the folder's file: `.devcontainer/devcontainer.json`, or else `.devcontainer.json`. Returns `None` if it
    /// has neither.
    ///
    /// # Errors
    /// [`DevcontainerError::File`] names the file.
    pub fn read(folder: &Path) -> Result<Option<DevcontainerFile>, DevcontainerError> {
        file::read(folder)
    }

    /// Returns a value with only `forwardPorts`.
    pub fn forwarding(ports: impl IntoIterator<Item = NonZeroU16>) -> Devcontainer {
        Devcontainer { forward: ports.into_iter().collect(), ..Devcontainer::default() }
    }

    /// Marks the content as that of an image, which names no port below 1024.
    fn of_image(mut self) -> Devcontainer {
        self.forward.retain(|port| port.get() >= FIRST_UNPRIVILEGED);
        self.ports.values_mut().for_each(|attributes| attributes.from_image = true);
        self
    }

    /// Merges `later` over this value.
    #[must_use]
    pub fn merge(mut self, later: Devcontainer) -> Devcontainer {
        self.forward.extend(later.forward);
        self.ports.extend(later.ports);
        self.others = later.others.or(self.others);
        // An image replaces a build, and the other way round.
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

    /// Returns the port policy; `None` if it is the default.
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

    /// Returns the notes about ports. If several apply to a port, the last one counts.
    pub fn notes(&self) -> Vec<PortNote> {
        let others = self.others.clone().map(|others| (Ports::ALL, others));
        let mut notes: Vec<PortNote> = Vec::new();
        for (ports, attributes) in others.into_iter().chain(self.resolved()) {
            let silent = attributes.on_auto_forward == Some(OnAutoForward::Silent);
            // An empty note is needed only to override a wider one.
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

    /// Returns the image of the container.
    pub fn image(&self) -> Option<&str> {
        self.image.as_deref()
    }

    /// Returns the source from which the image is built.
    pub fn build(&self) -> Option<&Build> {
        self.build.as_ref()
    }

    /// Returns the names of the fields without effect. They are untrusted text: escape them before printing.
    pub fn not_used(&self) -> &[String] {
        &self.not_used
    }

    /// Returns all entries, wide ranges first. Attributes that an entry lacks come from the narrowest range that
    /// contains it.
    fn resolved(&self) -> impl Iterator<Item = (Ports, Attributes)> {
        self.ports.iter().enumerate().map(|(at, (ports, attributes))| {
            let around = self.ports.iter().take(at).filter(|(wider, _)| wider.holds(*ports));
            // From the widest to the narrowest, each overriding those before it.
            let around = around.fold(Attributes::default(), |wider, (_, narrower)| narrower.or(&wider));
            (*ports, attributes.or(&around))
        })
    }
}

/// Parses a container's label `devcontainer.metadata`. `image` is the same label of its image. Its entries, which a dev
/// container tool repeats in the label of the container, open no port below 1024.
///
/// # Errors
/// [`DevcontainerError`] names the invalid field.
pub fn from_metadata(label: &str, image: Option<&str>) -> Result<Devcontainer, DevcontainerError> {
    parse::label(label, image)
}

#[cfg(test)]
mod tests;
