//! The helper's image and its container.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use bollard::body_try_stream;
use bollard::errors::Error;
use bollard::models::{
    ContainerCreateBody, HostConfig, Mount, MountType, RestartPolicy, RestartPolicyNameEnum,
};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, CreateImageOptionsBuilder, ListImagesOptionsBuilder, RemoveImageOptions,
    StartContainerOptions,
};
use futures_util::StreamExt;
use futures_util::stream::unfold;
use tokio::sync::mpsc;

use super::image::{CHUNK_BYTES, CHUNKS_MAX, ChunkWriter};
use super::{ContainerActions, DockerError, Engine};
use crate::docker::AGENT_DIRECTORY;
use crate::docker::helper::{
    BUILD_LABEL, CAPABILITIES, HelperPlan, HelperSeen, LABEL, PROCESSES_MAX, PROGRAM, seccomp,
};

impl Engine {
    /// Returns the container of this name.
    pub(in crate::docker) async fn helper(&self, name: &str) -> Result<Option<HelperSeen>, DockerError> {
        let Some(inspected) = self.inspect(name).await? else { return Ok(None) };
        let mut labels = inspected.config.and_then(|config| config.labels).unwrap_or_default();
        Ok(Some(HelperSeen {
            home: labels.remove(LABEL),
            build: labels.remove(BUILD_LABEL),
            running: inspected.state.and_then(|state| state.running).unwrap_or(false),
        }))
    }

    /// Returns whether the engine is rootless.
    pub(in crate::docker) async fn is_rootless(&self) -> Result<bool, DockerError> {
        let inspected = self.client.info().await.map_err(|error| self.refused(&error))?;
        let options = inspected.security_options.unwrap_or_default();
        Ok(options
            .iter()
            .any(|option| option.split(',').any(|word| word == "name=rootless" || word == "rootless")))
    }

    /// Creates and starts the container.
    pub(in crate::docker) async fn create_helper(&self, plan: &HelperPlan) -> Result<(), DockerError> {
        let image = format!("{}:{}", plan.name, plan.build);
        match self.client.inspect_image(&image).await {
            Ok(_) => {}
            Err(Error::DockerResponseServerError { status_code: 404, .. }) => self.import(plan).await?,
            Err(error) => return Err(self.refused(&error)),
        }
        let options = CreateContainerOptionsBuilder::default().name(&plan.name).build();
        let created = self.client.create_container(Some(options), request(plan, &image)).await;
        created.map_err(|error| self.refused(&error))?;
        let started = self.client.start_container(&plan.name, None::<StartContainerOptions>).await;
        started.map_err(|error| self.error(&plan.name, &error))?;
        self.remove_images(&plan.name, Some(&image)).await;
        Ok(())
    }

    /// Returns how the container ended, if it has ended.
    pub(in crate::docker) async fn helper_end(&self, name: &str) -> Result<Option<String>, DockerError> {
        let state = self.inspect(name).await?.and_then(|inspected| inspected.state).unwrap_or_default();
        if state.running == Some(true) {
            return Ok(None);
        }
        Ok(Some(self.end_text(name, &state).await))
    }

    /// Removes the container, running or not.
    pub(in crate::docker) async fn remove_helper(&self, name: &str) -> Result<(), DockerError> {
        self.remove(name).await
    }

    /// Creates the image: a file system with only the program.
    async fn import(&self, plan: &HelperPlan) -> Result<(), DockerError> {
        let (sender, receiver) = mpsc::channel(CHUNKS_MAX);
        let program = plan.program.clone();
        let writer = tokio::task::spawn_blocking(move || {
            let packed = pack(&program, BufWriter::with_capacity(CHUNK_BYTES, ChunkWriter(sender.clone())));
            if let Err(error) = &packed {
                // The error makes the engine reject the incomplete program.
                let _ = sender.blocking_send(Err(io::Error::new(error.kind(), error.to_string())));
            }
            packed
        });
        let chunks =
            unfold(receiver, |mut receiver| async { receiver.recv().await.map(|chunk| (chunk, receiver)) });
        let options =
            CreateImageOptionsBuilder::default().from_src("-").repo(&plan.name).tag(&plan.build).build();
        let mut inspected =
            Box::pin(self.client.create_image(Some(options), Some(body_try_stream(chunks)), None));
        let failed =
            |why: String| DockerError::Refused(format!("the helper's image cannot be created: {why}"));
        let mut imported = Ok(());
        while let Some(word) = inspected.next().await {
            imported = imported.and(word.map(drop).map_err(|error| match self.refused(&error) {
                DockerError::Refused(why) => failed(why),
                error => error,
            }));
        }
        drop(inspected);
        match writer.await {
            Ok(Err(error)) if error.kind() != io::ErrorKind::BrokenPipe => Err(failed(error.to_string())),
            _ => imported,
        }
    }

    /// Removes the helper's images except one. An image that cannot be removed only uses disk space.
    pub(in crate::docker) async fn remove_images(&self, name: &str, keep: Option<&str>) {
        let filters: HashMap<&str, Vec<String>> = HashMap::from([("reference", vec![name.to_owned()])]);
        let options = ListImagesOptionsBuilder::default().filters(&filters).build();
        let listed = self.client.list_images(Some(options)).await.unwrap_or_default();
        let tags = listed.into_iter().flat_map(|listed| listed.repo_tags);
        for other in tags.filter(|tag| Some(tag.as_str()) != keep) {
            let _ = self.client.remove_image(&other, None::<RemoveImageOptions>, None).await;
        }
    }
}

/// Writes a file system with one file.
fn pack(program: &Path, out: impl Write) -> io::Result<()> {
    let mut file = File::open(program)?;
    let mut header = tar::Header::new_ustar();
    header.set_size(file.metadata()?.len());
    header.set_mode(0o755);
    header.set_entry_type(tar::EntryType::Regular);
    let mut archive = tar::Builder::new(out);
    archive.append_data(&mut header, PROGRAM.trim_start_matches('/'), &mut file)?;
    archive.into_inner()?.flush()
}

/// Returns the request that creates the container.
fn request(plan: &HelperPlan, image: &str) -> ContainerCreateBody {
    let words = |words: &[&str]| Some(words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
    let mount = Mount {
        typ: Some(MountType::BIND),
        source: Some(plan.directory.display().to_string()),
        target: Some(AGENT_DIRECTORY.to_owned()),
        ..Mount::default()
    };
    ContainerCreateBody {
        image: Some(image.to_owned()),
        entrypoint: words(&[PROGRAM]),
        cmd: words(&["_helper", &plan.user.to_string()]),
        // Root, with the group of the directory.
        user: Some(format!("0:{}", plan.group)),
        labels: Some(HashMap::from([
            (LABEL.to_owned(), plan.home.clone()),
            (BUILD_LABEL.to_owned(), plan.build.clone()),
        ])),
        // It has no work to finish, and the first process of a namespace receives no signal without a handler.
        stop_signal: Some("SIGKILL".to_owned()),
        host_config: Some(HostConfig {
            network_mode: Some("none".to_owned()),
            userns_mode: Some("host".to_owned()),
            readonly_rootfs: Some(true),
            cap_drop: words(&["ALL"]),
            cap_add: words(&CAPABILITIES),
            security_opt: words(&["no-new-privileges", &format!("seccomp={}", seccomp::profile())]),
            pids_limit: Some(PROCESSES_MAX),
            restart_policy: Some(RestartPolicy {
                name: Some(RestartPolicyNameEnum::NO),
                maximum_retry_count: None,
            }),
            mounts: Some(vec![mount]),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_contains_only_the_program() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("any-name");
        std::fs::write(&program, "the program").unwrap();
        let mut packed = Vec::new();
        pack(&program, &mut packed).unwrap();
        let mut archive = tar::Archive::new(packed.as_slice());
        let mut entries = archive.entries().unwrap();
        let entry = entries.next().unwrap().unwrap();
        assert_eq!(entry.path().unwrap(), Path::new("landfall"));
        assert_eq!((entry.header().mode().unwrap(), entry.size()), (0o755, 11));
        assert!(entries.next().is_none());
    }

    /// The user agrees to exactly these privileges, so the test repeats them.
    #[test]
    fn the_container_has_only_the_documented_privileges() {
        let plan = HelperPlan {
            name: "n".to_owned(),
            home: "/h".to_owned(),
            build: "b".to_owned(),
            program: "/p".into(),
            directory: "/h/run/helper".into(),
            group: 7,
            user: 1000,
        };
        let made = serde_json::to_value(request(&plan, "landfall-helper:b")).unwrap();
        assert_eq!(
            made,
            serde_json::json!({
                "Image": "landfall-helper:b", "Entrypoint": ["/landfall"], "Cmd": ["_helper", "1000"], "User": "0:7",
                "Labels": {"dev.landfall.helper": "/h", "dev.landfall.build": "b"}, "StopSignal": "SIGKILL",
                "HostConfig": {
                    "NetworkMode": "none", "UsernsMode": "host", "ReadonlyRootfs": true, "CapDrop": ["ALL"],
                    "CapAdd": ["SYS_ADMIN", "SYS_PTRACE"], "SecurityOpt": ["no-new-privileges", format!("seccomp={}", seccomp::profile())], "PidsLimit": 600,
                    "RestartPolicy": {"Name": "no"},
                    "Mounts": [{"Type": "bind", "Source": "/h/run/helper", "Target": "/run/landfall"}]
                }
            })
        );
    }
}
