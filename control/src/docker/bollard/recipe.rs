//! Converts the inspection of a container to a request that creates the same container from another image.
//!
//! The inspection merges the container's own configuration with its image's. Only the container's own part is kept: where
//! both agree, the new image decides. The user is an exception, which `user` explains. Docker generates the host name, the
//! addresses and the endpoint ids of a container again. Anonymous volumes would be lost with their container, so they are
//! kept under the names that Docker gave them.

use std::collections::HashMap;

use super::models::{
    ContainerConfig, ContainerCreateBody, ContainerInspectResponse, EndpointSettings, HostConfig,
    ImageConfig, MountPoint, NetworkingConfig,
};
use super::user::User;
use crate::docker::rebuild::USER_LABEL;

/// The length of the prefix of a container's id that Docker uses as its host name, in characters.
const SHORT_ID: usize = 12;

/// The request that creates a container.
#[derive(Debug)]
pub(super) struct Recipe {
    pub(super) body: ContainerCreateBody,
    /// The networks after the first: older engines accept one network per request.
    pub(super) networks: Vec<(String, EndpointSettings)>,
}

/// Returns the recipe of a container, from `image` instead of its old image, whose configuration is `defaults`.
pub(super) fn recipe(
    inspected: ContainerInspectResponse,
    defaults: &ImageConfig,
    image: &str,
    user: User,
) -> Recipe {
    let id = inspected.id.unwrap_or_default();
    let short_id = id.get(..SHORT_ID).unwrap_or(&id);
    let mut host = inspected.host_config.unwrap_or_default();
    keep_volumes(&mut host, &inspected.mounts.unwrap_or_default());
    // Docker's client wrote this file once, and refuses to write it again.
    host.container_id_file = None;
    let told_networks = inspected.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
    // Podman reports "bridge" for any network, which would add the network of that name.
    if matches!(host.network_mode.as_deref(), Some("bridge" | "default"))
        && !told_networks.contains_key("bridge")
        && let Some(name) = told_networks.keys().min()
    {
        host.network_mode = Some(name.clone());
    }
    let mode = host.network_mode.clone().unwrap_or_default();
    let (first, networks) = networks(&mode, told_networks, short_id);
    host.group_add = user.groups.or(host.group_add);
    let mut body = own(inspected.config.unwrap_or_default(), defaults, short_id);
    body.user = user.user;
    body.labels.get_or_insert_default().insert(USER_LABEL.to_owned(), user.requested.unwrap_or_default());
    if mode.starts_with("container:") || host.uts_mode.as_deref() == Some("host") {
        // The host name is the other container's, or the host's.
        body.hostname = None;
        body.domainname = None;
    }
    body.image = Some(image.to_owned());
    body.networking_config = first.map(|(name, endpoint)| NetworkingConfig {
        endpoints_config: Some(HashMap::from([(name, endpoint)])),
    });
    body.host_config = Some(host);
    Recipe { body, networks }
}

/// Returns the container's own part of its configuration.
fn own(config: ContainerConfig, image: &ImageConfig, short_id: &str) -> ContainerCreateBody {
    let entrypoint_is_images = config.entrypoint == image.entrypoint;
    let cmd_is_images = entrypoint_is_images && config.cmd == image.cmd;
    ContainerCreateBody {
        hostname: config.hostname.filter(|name| name != short_id),
        domainname: config.domainname,
        user: None,
        attach_stdin: config.attach_stdin,
        attach_stdout: config.attach_stdout,
        attach_stderr: config.attach_stderr,
        exposed_ports: config.exposed_ports.map(|ports| without(ports, image.exposed_ports.as_deref())),
        tty: config.tty,
        open_stdin: config.open_stdin,
        stdin_once: config.stdin_once,
        env: config.env.map(|env| without(env, image.env.as_deref())),
        cmd: config.cmd.filter(|_| !cmd_is_images),
        healthcheck: other_than(config.healthcheck, image.healthcheck.as_ref()),
        args_escaped: None,
        image: None,
        volumes: config.volumes.map(|volumes| without(volumes, image.volumes.as_deref())),
        working_dir: other_than(config.working_dir, image.working_dir.as_ref()),
        entrypoint: config.entrypoint.filter(|_| !entrypoint_is_images),
        network_disabled: config.network_disabled,
        on_build: None,
        labels: config.labels.map(|mut labels| {
            labels.retain(|name, value| {
                image.labels.as_ref().and_then(|labels| labels.get(name)) != Some(value)
            });
            labels
        }),
        stop_signal: other_than(config.stop_signal, image.stop_signal.as_ref()),
        stop_timeout: config.stop_timeout,
        shell: None,
        host_config: None,
        networking_config: None,
    }
}

fn other_than<T: PartialEq>(own: Option<T>, image: Option<&T>) -> Option<T> {
    own.filter(|own| image != Some(own))
}

fn without(mut own: Vec<String>, image: Option<&[String]>) -> Vec<String> {
    own.retain(|entry| !image.is_some_and(|image| image.contains(entry)));
    own
}

/// Adds anonymous volumes by name.
fn keep_volumes(host: &mut HostConfig, mounted: &[MountPoint]) {
    for mount in mounted.iter().filter(|mount| mount.typ.as_deref() == Some("volume")) {
        let (Some(volume), Some(place)) = (&mount.name, &mount.destination) else { continue };
        let requested =
            host.mounts.iter_mut().flatten().find(|requested| requested.target.as_ref() == Some(place));
        if let Some(requested) = requested {
            requested.source = Some(volume.clone());
            continue;
        }
        let at_place = |bind: &String| bind.split(':').nth(1) == Some(place);
        let binds = host.binds.get_or_insert_default();
        if !binds.iter().any(at_place) {
            let mode = if mount.rw == Some(false) { ":ro" } else { "" };
            binds.push(format!("{volume}:{place}{mode}"));
        }
    }
}

/// Returns the network on which the container is created, and the others.
#[expect(clippy::type_complexity, reason = "one pair is the first of many such pairs")]
fn networks(
    mode: &str,
    inspected: HashMap<String, EndpointSettings>,
    short_id: &str,
) -> (Option<(String, EndpointSettings)>, Vec<(String, EndpointSettings)>) {
    // Podman's modes that give a container the host's outbound network without a network of its own may have options.
    let outbound = ["slirp4netns", "pasta", "private"].contains(&mode.split(':').next().unwrap_or_default());
    if mode == "host" || mode == "none" || mode.starts_with("container:") || outbound {
        return (None, Vec::new());
    }
    let mut rest: Vec<(String, EndpointSettings)> = inspected
        .into_iter()
        .map(|(name, endpoint)| {
            let aliases = endpoint.aliases.map(|mut aliases| {
                aliases.retain(|alias| alias != short_id);
                aliases
            });
            let requested = EndpointSettings {
                ipam_config: endpoint.ipam_config,
                links: endpoint.links,
                aliases: aliases.filter(|aliases| !aliases.is_empty()),
                driver_opts: endpoint.driver_opts,
                gw_priority: endpoint.gw_priority.filter(|priority| *priority != 0),
                ..EndpointSettings::default()
            };
            (name, requested)
        })
        .collect();
    rest.sort_by(|(one, _), (other, _)| one.cmp(other));
    let wanted = if mode == "default" { "bridge" } else { mode };
    let first = rest.iter().position(|(name, _)| name == wanted).map(|at| rest.remove(at));
    (first, rest)
}

#[cfg(test)]
#[path = "recipe_tests.rs"]
mod tests;
