//! Lists what a folder's file asks for, so that its user can approve it. Pure.

use std::time::Duration;

use super::Folder;

/// One thing that the file would have the daemon do or allow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Demand<'a> {
    /// A command of the host.
    Command {
        /// When it runs.
        purpose: Purpose<'a>,
        /// The program and its arguments.
        words: &'a [String],
        /// How long it may take, where the file says so.
        timeout: Option<Duration>,
    },
    /// Programs in the folder itself may be among the commands.
    FolderPrograms,
    /// The container may replace these keys of a file in the folder.
    Secrets {
        /// The name of the file.
        file: String,
        /// The keys below `channels`.
        keys: &'a [String],
    },
    /// The container's programs look for these tools of the host. A request, not a grant.
    Tools(&'a [String]),
}

/// When a command runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Purpose<'a> {
    /// Before each restart; another status than 0 refuses it.
    Preflight,
    /// At a restart, to end the container.
    Stop,
    /// At a restart, to start it.
    Start,
    /// At intervals.
    Job {
        /// The job's name.
        name: &'a str,
        /// From one run to the next.
        every: Duration,
        /// Whether a run that succeeded restarts the container.
        restart: bool,
    },
    /// Before each run of a job; status 0 lets it run.
    Gate {
        /// The job's name.
        name: &'a str,
    },
}

impl Folder {
    /// Everything that the file asks for, in the order of its documentation. A file that asks for nothing needs no approval.
    pub fn demands(&self) -> Vec<Demand<'_>> {
        let restart = &self.restart;
        let at_restart = [
            (Purpose::Preflight, &restart.preflight),
            (Purpose::Stop, &restart.stop),
            (Purpose::Start, &restart.start),
        ];
        let mut demands: Vec<Demand<'_>> = at_restart
            .into_iter()
            .filter_map(|(purpose, words)| Some((purpose, words.as_ref()?)))
            .map(|(purpose, words)| Demand::Command { purpose, words, timeout: None })
            .collect();
        for (name, job) in &self.jobs {
            let timeout = Some(job.timeout);
            if let Some(words) = &job.gate {
                demands.push(Demand::Command { purpose: Purpose::Gate { name }, words, timeout });
            }
            let purpose = Purpose::Job { name, every: job.every, restart: job.restart };
            demands.push(Demand::Command { purpose, words: &job.command, timeout });
        }
        demands.extend(self.trust_folder.then_some(Demand::FolderPrograms));
        demands.extend(self.secrets.as_ref().map(|secrets| Demand::Secrets {
            file: secrets.file.to_string_lossy().into_owned(),
            keys: &secrets.keys,
        }));
        let wants = self.tools.as_ref().map(|tools| tools.wants.as_slice()).unwrap_or_default();
        demands.extend((!wants.is_empty()).then_some(Demand::Tools(wants)));
        demands
    }
}
