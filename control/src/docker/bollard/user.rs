//! Determines the user of a rebuilt container. Pure, except that two files of the container are read by the caller.
//!
//! A container that requests its own rebuild controls the new image, and so its `USER` and its `/etc/passwd`: `USER 0`, or a
//! line that gives uid 0 to the name of its old user, would make it root inside. The user is therefore pinned: it is looked
//! up in the present container, as Docker does at each start, and set for the new container as two numbers. Supplementary
//! groups from the old image are not kept.
//!
//! A rebuild by the host's user takes the user of the new image, as with Docker itself, unless the container was created
//! with its own user (`docker run --user`). A pinned user looks the same as such a user. Each container that landfall
//! creates therefore has the label [`USER_LABEL`]: the user that was requested when it was first created, empty if its image
//! decides. A container without that label was created by another program, and its user is compared with its image's.

use std::collections::HashMap;

use super::models::{ContainerConfig, ImageConfig};
use crate::docker::DockerError;
use crate::docker::labels::{ContainerLabels, ImageLabels};
use crate::docker::rebuild::{USER_LABEL, UserOfRebuild};

/// The user of a new container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct User {
    /// The user with which the container is created; `None` if its image decides.
    pub(super) user: Option<String>,
    /// The user that was requested when the container was first created; `None` if its image decided.
    pub(super) requested: Option<String>,
    /// The groups to add, by number if they are pinned.
    pub(super) groups: Option<Vec<String>>,
}

/// The users and groups of a container: the content of its `/etc/passwd` and `/etc/group`.
#[derive(Clone, Debug, Default)]
pub(super) struct Accounts {
    pub(super) passwd: String,
    pub(super) group: String,
}

/// Returns the user that was requested when a container was first created. Only a label of the container itself is used,
/// since the container may have built the image.
pub(super) fn requested_user(
    labels: &ContainerLabels,
    config: &ContainerConfig,
    image: &ImageConfig,
) -> Option<String> {
    let requested = match labels.own(USER_LABEL) {
        Some(requested) => Some(requested.to_owned()),
        None => config.user.clone().filter(|user| image.user.as_ref() != Some(user)),
    };
    requested.filter(|user| !user.is_empty())
}

/// Returns whether the container's accounts are needed to pin the user or one of the groups.
pub(super) fn needs_accounts(user: &str, groups: &[String]) -> bool {
    !is_pinned(user) || groups.iter().any(|group| number(group).is_none())
}

/// Returns whether a user is numeric. An empty user is root.
fn is_pinned(user: &str) -> bool {
    match user.split_once(':') {
        Some((user, group)) => number(user).is_some() && number(group).is_some(),
        None => user.is_empty(),
    }
}

/// Returns the user and the groups of a container as numbers.
///
/// # Errors
/// [`DockerError::Refused`] names the unknown account.
pub(super) fn pin(
    user: &str,
    groups: &[String],
    accounts: &Accounts,
) -> Result<(String, Vec<String>), DockerError> {
    let groups = groups.iter().map(|group| Ok(group_id(group, accounts)?.to_string()));
    Ok((pin_user(user, accounts)?, groups.collect::<Result<_, DockerError>>()?))
}

/// Resolves a user as Docker does: a number is a uid, other text a name; the group is the given one, else that of the
/// user's line, else 0.
fn pin_user(user: &str, accounts: &Accounts) -> Result<String, DockerError> {
    let (name, group) = user.split_once(':').map_or((user, None), |(user, group)| (user, Some(group)));
    let (name, group) = (if name.is_empty() { "0" } else { name }, group.filter(|group| !group.is_empty()));
    let mut lines = accounts.passwd.lines().map(|line| line.trim().split(':').collect::<Vec<_>>());
    let (uid, line) = match number(name) {
        Some(uid) => (uid, lines.find(|line| line.get(2).and_then(|text| number(text)) == Some(uid))),
        None => {
            let line = lines.find(|line| line.first() == Some(&name)).ok_or_else(|| unknown("user", name))?;
            (line.get(2).and_then(|text| number(text)).ok_or_else(|| unknown("user", name))?, Some(line))
        }
    };
    let gid = match (group, line) {
        (Some(group), _) => group_id(group, accounts)?,
        (None, Some(line)) => {
            line.get(3).and_then(|text| number(text)).ok_or_else(|| unknown("group of the user", name))?
        }
        (None, None) => 0,
    };
    Ok(format!("{uid}:{gid}"))
}

fn group_id(group: &str, accounts: &Accounts) -> Result<u32, DockerError> {
    if let Some(gid) = number(group) {
        return Ok(gid);
    }
    let mut lines = accounts.group.lines().map(|line| line.trim().split(':').collect::<Vec<_>>());
    let line = lines.find(|line| line.first() == Some(&group));
    line.and_then(|line| number(line.get(2)?)).ok_or_else(|| unknown("group", group))
}

fn number(text: &str) -> Option<u32> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

fn unknown(what: &str, name: &str) -> DockerError {
    DockerError::Refused(format!(
        "the {what} {name} of the container is not in its /etc/passwd or /etc/group"
    ))
}

/// Checks the labels of a new image. No image may have [`USER_LABEL`]. An image that the container chose may not repeat one
/// of the container's own labels with the same value: it would then count as the image's, and change with the next image.
///
/// # Errors
/// [`DockerError::Refused`] names the label.
pub(super) fn check_image_labels(
    image: Option<HashMap<String, String>>,
    own: &ContainerLabels,
    user: UserOfRebuild,
) -> Result<(), DockerError> {
    let refused = |why: String| Err(DockerError::Refused(format!("the new image is not used: {why}")));
    let ImageLabels::Known(image) = ImageLabels::of(image.unwrap_or_default()) else {
        return refused("its labels are too long".to_owned());
    };
    for (name, value) in image {
        if name == USER_LABEL {
            return refused(format!("its label {name} is reserved for containers"));
        }
        if user == UserOfRebuild::Recorded && own.own(&name) == Some(value.as_str()) {
            return refused(format!("its label {name} repeats a label that was set on the container"));
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "user_tests.rs"]
mod tests;
