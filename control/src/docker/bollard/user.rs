//! The user that a rebuilt container runs as. Pure, but for two files that are read from the container.
//!
//! A container that asks for its own rebuild chooses the new image, and so its `USER` and its `/etc/passwd`: `USER 0`, or a
//! line that gives uid 0 to the name of its old user, would make it root inside. So the user is pinned: looked up in the
//! container as it is, as Docker does at each start, and given to the new container as two numbers. Supplementary groups
//! that the old image listed are not kept.
//!
//! The host's user who rebuilds gets the user of the new image, as with Docker itself, unless the container was made with a
//! user of its own (`docker run --user`). Pinned, the two look alike. So each container that landfall makes has the label
//! [`USER_LABEL`]: the user that was asked for when the container was first made, and nothing where its image decides.
//! A container without that label was not made here, and is compared with its image.

use std::collections::HashMap;

use super::models::{ContainerConfig, ImageConfig};
use crate::docker::DockerError;
use crate::docker::labels::{ContainerLabels, ImageLabels};
use crate::docker::rebuild::{USER_LABEL, UserOfRebuild};

/// The user of a new container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct User {
    /// The user that the container is created with; without one, its image decides.
    pub(super) user: Option<String>,
    /// The user that was asked for when the container was first made; without one, its image decided.
    pub(super) asked: Option<String>,
    /// The groups to add, by number where they are pinned.
    pub(super) groups: Option<Vec<String>>,
}

/// The users and groups that a container knows: the content of its `/etc/passwd` and `/etc/group`.
#[derive(Clone, Debug, Default)]
pub(super) struct Accounts {
    pub(super) passwd: String,
    pub(super) group: String,
}

/// The user that was asked for when a container was first made. Only a label of the container itself counts, since the image
/// may be one that the container built.
pub(super) fn asked_for(
    labels: &ContainerLabels,
    config: &ContainerConfig,
    image: &ImageConfig,
) -> Option<String> {
    let asked = match labels.own(USER_LABEL) {
        Some(asked) => Some(asked.to_owned()),
        None => config.user.clone().filter(|user| image.user.as_ref() != Some(user)),
    };
    asked.filter(|user| !user.is_empty())
}

/// Whether a user or one of the groups can only be pinned with the container's accounts.
pub(super) fn needs_accounts(user: &str, groups: &[String]) -> bool {
    !is_pinned(user) || groups.iter().any(|group| number(group).is_none())
}

/// No user at all is root, by number.
fn is_pinned(user: &str) -> bool {
    match user.split_once(':') {
        Some((user, group)) => number(user).is_some() && number(group).is_some(),
        None => user.is_empty(),
    }
}

/// The user and the groups of a container by their numbers.
///
/// # Errors
/// [`DockerError::Refused`] names the account that the container does not know.
pub(super) fn pin(
    user: &str,
    groups: &[String],
    accounts: &Accounts,
) -> Result<(String, Vec<String>), DockerError> {
    let groups = groups.iter().map(|group| Ok(group_id(group, accounts)?.to_string()));
    Ok((pin_user(user, accounts)?, groups.collect::<Result<_, DockerError>>()?))
}

/// As Docker reads a user: a number is a uid, else it is a name; the group is its own, then that of the user's line, then 0.
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

/// Checks the labels of a new image. No image may have [`USER_LABEL`]. An image that the container chose may have no label of
/// the container's own with the same value: from then on that would count as the image's, and go with the next image.
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
            return refused(format!("the container was given its label {name} when it was made"));
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "user_tests.rs"]
mod tests;
