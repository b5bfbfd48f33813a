//! Lists the demands of a folder's file, so that its user can approve them. Pure.

use std::time::Duration;

use super::Folder;

/// One action or permission that the file demands of the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Demand<'a> {
    /// A command to run on the host.
    Command {
        /// When it runs.
        purpose: Purpose<'a>,
        /// The program and its arguments.
        words: &'a [String],
        /// The time limit, if the file sets one.
        timeout: Option<Duration>,
    },
    /// Commands may be programs in the folder itself.
    FolderPrograms,
    /// The container may replace these keys of a file in the folder.
    Secrets {
        /// The name of the file.
        file: String,
        /// The keys below `channels`.
        keys: &'a [String],
    },
    /// The container's programs use these tools of the host. A request, not a grant.
    Tools(&'a [String]),
}

/// The occasion on which a command runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Purpose<'a> {
    /// Before each restart. A status other than 0 refuses the restart.
    Preflight,
    /// At a restart, to stop the container.
    Stop,
    /// At a restart, to start the container.
    Start,
    /// At intervals.
    Job {
        /// The job's name.
        name: &'a str,
        /// The interval from one run to the next.
        every: Duration,
        /// Whether a successful run restarts the container.
        restart: bool,
    },
    /// Before each run of a job. Status 0 permits the run.
    Gate {
        /// The job's name.
        name: &'a str,
    },
}

impl Folder {
    /// Returns all demands of the file, in the order of its documentation. A file without demands needs no approval.
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
